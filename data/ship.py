"""Make the file of a trained network that the repository ships, from its checkpoint.

    python -m data.ship checkpoints/q2-NAME.pt data/pretrained/q2.pt

The weights have half precision; the optimizer's state is left out, so training cannot be resumed.
"""

from pathlib import Path
from typing import Any

import torch

import utils


def shipped(content: dict[str, Any]) -> dict[str, Any]:
    """A checkpoint's content without the optimizer's state, the weights that predict in float16.
    Raises UserError if one of them is too large for it."""
    part = "best" if "best" in content else "model"  # question 3 predicts by its best epoch
    weights = {k: w.half() if w.is_floating_point() else w for k, w in content[part].items()}
    if not all(w.isfinite().all() for w in weights.values()):
        raise utils.UserError("a weight is not finite in half precision")
    return content | {"optimizer": {}, "model": {}} | {part: weights}


def main(argv: list[str] | None = None) -> None:
    """Do what the command line says."""
    parser = utils.Parser("python -m data.ship", "%(prog)s CHECKPOINT OUTPUT", description=__doc__)
    parser.add_argument("checkpoint", type=Path, help="the checkpoint of a finished run")
    parser.add_argument("output", type=Path, help="the file to write")
    args = parser.parse_args(argv)
    content = shipped(utils.load_checkpoint(args.checkpoint))
    utils.write_file(args.output, lambda file: torch.save(content, file))
    print(f"Wrote {args.output} ({args.output.stat().st_size / 2**20:.1f} MiB)")


if __name__ == "__main__":
    utils.run_script(main)
