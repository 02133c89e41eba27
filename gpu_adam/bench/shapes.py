"""Shapes of real models' variables, from their published definitions; tests compare the totals with those published."""

from __future__ import annotations

Shape = tuple[int, ...]


def gpt2() -> list[Shape]:
    """GPT-2 small, 124,439,808 parameters in 148 variables.

    Reference: Radford et al. 2019; ``n_layer=12, n_embd=768, n_ctx=1024, n_vocab=50257`` in model.py of openai/gpt-2.
    The output layer shares the token embedding.
    """
    width, layers = 768, 12
    norm = [(width,), (width,)]

    def linear(rows: int, columns: int) -> list[Shape]:
        return [(rows, columns), (columns,)]

    attention = [*linear(width, 3 * width), *linear(width, width)]
    mlp = [*linear(width, 4 * width), *linear(4 * width, width)]
    return [(50257, width), (1024, width), *layers * [*norm, *attention, *norm, *mlp], *norm]


def resnet50() -> list[Shape]:
    """ResNet-50, 25,557,032 parameters in 161 variables.

    Reference: He et al. 2015 (arXiv:1512.03385), table 1; the layers of torchvision.models.resnet50.
    """

    def convolution(outputs: int, inputs: int, size: int) -> list[Shape]:
        return [(outputs, inputs, size, size), (outputs,), (outputs,)]  # with its batch norm's scale and shift

    shapes = convolution(64, 3, 7)
    inputs = 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            shapes += convolution(width, inputs, 1) + convolution(width, width, 3) + convolution(4 * width, width, 1)
            if block == 0:
                shapes += convolution(4 * width, inputs, 1)
            inputs = 4 * width
    return [*shapes, (1000, inputs), (1000,)]


def dlrm_tables() -> list[Shape]:
    """The 26 embedding tables of the DLRM for the Criteo Kaggle data: 33,762,577 rows of 16.

    Reference: Naumov et al. 2019 (arXiv:1906.00091); bench/dlrm_s_criteo_kaggle.sh of facebookresearch/dlrm
    (``--arch-sparse-feature-size=16 --mini-batch-size=128``); the counts of the data's categories.
    """
    rows = (
        1460, 583, 10131227, 2202608, 305, 24, 12517, 633, 3, 93145, 5683, 8351593, 3194, 27, 14992, 5461306, 10, 5652,
        2173, 4, 7046547, 18, 15, 286181, 105, 142572,
    )  # fmt: skip
    return [(count, 16) for count in rows]
