"""Values in messages."""

from leapformer.files.showing import LONGEST, cut, shown


def test_a_text_is_cut_in_its_middle_and_on_one_line():
    assert cut("a\n b\tc") == "a b c"
    assert len(cut("x" * 10**6)) == LONGEST and cut("a" + "x" * 500 + "z").endswith("z")
    assert len(cut("x" * 300, 240)) == 240


def test_only_the_beginning_of_a_large_value_is_written_out():
    bomb = "x"
    for _ in range(60):
        bomb = [bomb] * 9  # 9 ** 60 values, each list there once
    deep = []
    for _ in range(100_000):
        deep = [deep]
    for value in (bomb, deep, "y" * 10**7, 10**100_000, {n: n for n in range(10**5)}, b"z" * 10**6):
        assert len(shown(value)) <= LONGEST
    assert (
        shown("a'b") == '"a\'b"' and shown({"a": [1, None]}) == "{'a': [1, None]}" and shown("a\0\n") == "'a\\x00\\n'"
    )
    assert shown(10**100_000) == "an integer of 332,193 bits"
    while deep:
        (deep,) = deep  # taking it apart at once would recurse
