"""How fast the exported ONNX forms load and run, against the dense form in the same runtime.

    python -m benchmarks.export_forms --weights-dir weights --out exports --results export.jsonl
    python -m benchmarks.export_speed --out exports --results export.jsonl --latency 31 --threads 1

Claim: `assemble-at-load` runs as fast as dense and takes longer to load; `lego` pays in large
networks only. The first command writes the files. Prints the medians and quartiles of dense / form
over interleaved runs of batch 1, in ONNX Runtime and OpenVINO. Takes about a minute per network.
Rows are appended to --results and not measured again; `--table` prints what is there.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.common.export_files import ONNX_FORMS, get_place, make_export_parser
from benchmarks.common.networks import NETWORKS
from benchmarks.common.results import Row, append_row, read_rows
from benchmarks.common.tables import format_head, format_row

Run = Callable[[Any], Any]


def open_onnx_runtime(path: Path, threads: int) -> Run:
    """A file as a function of ONNX Runtime."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, 4
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return lambda image: session.run(None, {"image": image})


def open_openvino(path: Path, threads: int) -> Run:
    """A file as a function of OpenVINO, in float32."""
    import openvino

    core = openvino.Core()
    settings = {"INFERENCE_NUM_THREADS": threads, "INFERENCE_PRECISION_HINT": "f32"}
    request = core.compile_model(str(path), "CPU", settings).create_infer_request()
    return lambda image: request.infer([image])


RUNTIMES = {"ONNX Runtime": open_onnx_runtime, "OpenVINO": open_openvino}


def time_forms(place: Path, runtime: str, threads: int, repeats: int) -> Row:
    """Time to load, and the median of dense / form over interleaved runs, batch 1."""
    load = RUNTIMES[runtime]
    image = torch.rand(1, 3, 224, 224, generator=torch.Generator().manual_seed(0)).numpy()
    forms: dict[str, Run] = {}
    loading: dict[str, list[float]] = {form: [] for form in reversed(ONNX_FORMS)}  # dense first
    for _ in range(4):
        for form in loading:
            start = time.perf_counter()
            forms[form] = load(place / f"{form}.onnx", threads)
            loading[form].append(time.perf_counter() - start)
    times: dict[str, list[float]] = {form: [] for form in loading}
    for turn in range(repeats + 2):
        for form, run in forms.items():
            start = time.perf_counter()
            run(image)
            if turn > 1:
                times[form].append(time.perf_counter() - start)
    ratios = {
        form: [a / b for a, b in zip(times["dense"], times[form], strict=True)] for form in forms
    }
    return {
        "runtime": runtime,
        "threads": threads,
        "repeats": repeats,
        "load": {form: min(loading[form]) / min(loading["dense"]) for form in forms},
        "ratio": {form: statistics.median(values) for form, values in ratios.items()},
        "quartiles": {form: statistics.quantiles(values)[::2] for form, values in ratios.items()},
    }


def print_table(rows: list[Row]) -> None:
    """Print one line per network and runtime."""
    columns = ["network", "filters", "runtime", "assemble-at-load", "loads in", "lego"]
    print(format_head(columns))
    for row in (row for row in rows if "ratio" in row):
        cells = [
            f"{row['ratio'][form]:.2f}x ({row['quartiles'][form][0]:.2f} to "
            f"{row['quartiles'][form][1]:.2f})"
            for form in ("assemble-at-load", "lego")
        ]
        loads = f"{row['load']['assemble-at-load']:.1f}x"
        print(format_row([row["name"], row["dtype"], row["runtime"], cells[0], loads, cells[1]]))


def main() -> None:
    """Time what is missing and print the table."""
    parser = make_export_parser(__doc__)
    parser.add_argument("--latency", type=int, default=31, help="timed runs of each form")
    parser.add_argument("--runtime", nargs="*", choices=RUNTIMES, default=list(RUNTIMES))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rows = read_rows(args.results)
    done = {(r["name"], r["dtype"], r.get("runtime")) for r in rows}
    jobs = [(n, d, r) for d in args.dtype for n in (args.only or NETWORKS) for r in args.runtime]
    for name, dtype, runtime in [] if args.table else jobs:
        place = get_place(args.out, name, dtype)
        if (name, dtype, runtime) in done:
            continue
        if not place.is_dir():
            print(f"{place} does not exist: benchmarks.export_forms writes it", flush=True)
            continue
        row = {
            "name": name,
            "dtype": dtype,
            **time_forms(place, runtime, args.threads, args.latency),
        }
        append_row(args.results, row)
        rows.append(row)
    print_table(rows)


if __name__ == "__main__":
    main()
