"""Weight-only experts on one NVIDIA card: marlin.cuda beside vLLM's Marlin chain, humming, cuTile and torch on bf16.

    python benchmarks/h200_experts.py [--only gpt-oss-120b-mxfp4] [--m 1,128] [--json experts.json]
    python benchmarks/h200_experts.py --tables experts.json

As h200_linear.py; routings are random. torch's baseline runs expert after expert, with routings known beforehand.
"""

from dataclasses import replace

from comparison import run
from figures import Layout
from halfbyte.problems import ExpertsProblem
from halfbyte.schemes import MXFP4_W4A16, NVFP4_W4A16

ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048)
EXAMPLE = ExpertsProblem(scheme=MXFP4_W4A16, experts=1, top_k=1, hidden=32, intermediate=32)
QWEN3 = replace(EXAMPLE, experts=128, top_k=8, hidden=2048, intermediate=768)
MIXTRAL = replace(EXAMPLE, experts=8, top_k=2, hidden=4096, intermediate=14336)
GPT_OSS = replace(EXAMPLE, experts=128, top_k=4, hidden=2880, intermediate=2880, activation="swigluoai", bias=True)
PROBLEMS = {
    "qwen3-30b-a3b-nvfp4": replace(QWEN3, scheme=NVFP4_W4A16),
    "qwen3-30b-a3b-mxfp4": QWEN3,
    "mixtral-8x7b-nvfp4": replace(MIXTRAL, scheme=NVFP4_W4A16),
    "mixtral-8x7b-mxfp4": MIXTRAL,
    "gpt-oss-120b-mxfp4": GPT_OSS,
}
LAYOUT = Layout(((1, 16), (32, 128), (256, 2048)), {"experts": {name: name for name in PROBLEMS}})


def main() -> None:
    """Measure and print the tables, or print those of a file."""
    run(__doc__ or "", PROBLEMS, ROWS, LAYOUT)


if __name__ == "__main__":
    main()
