from __future__ import annotations

from outsider_fp4.packing import pair_table


def test_the_low_nibble_comes_first() -> None:
    assert pair_table()[0x72].tolist() == [1.0, 6.0]


def test_the_high_bit_of_a_nibble_is_the_sign() -> None:
    assert pair_table()[0x9F].tolist() == [-6.0, -0.5]
