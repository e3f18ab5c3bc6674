# The commands on a CPU: docker build -t legocompress . && docker run --rm legocompress demo
FROM python:3.11-slim AS build
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ \
    && rm -rf /var/lib/apt/lists/*
COPY . /source
# Fail where the kernels cannot be compiled, instead of going on without them.
ENV LEGOCOMPRESS_REQUIRE_KERNELS=1
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /wheels /source

FROM python:3.11-slim
# The address of PyTorch's index of wheels for CPUs, which are smaller than the default ones.
ARG TORCH_INDEX=""
RUN pip install --no-cache-dir ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} torch torchvision
COPY --from=build /wheels /wheels
RUN set -- /wheels/*.whl && pip install --no-cache-dir "$1[onnx]"
# Any user may run the image and write to the caches of downloaded weights.
ENV HF_HOME=/cache TORCH_HOME=/cache
RUN useradd --create-home lego && mkdir --mode=1777 /cache
USER lego
WORKDIR /data
ENTRYPOINT ["legocompress"]
