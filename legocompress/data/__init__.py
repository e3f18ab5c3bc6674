"""Images in, and what a network does on them."""

from legocompress.data.evaluation import Evaluation
from legocompress.data.images import Images, open_images

__all__ = ["Evaluation", "Images", "open_images"]
