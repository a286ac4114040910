"""Tables of scores."""


def test_what_was_cut_otherwise_is_told() -> None:
    from nemo_upcycle.evaluation.scores import markdown
    from nemo_upcycle.evaluation.tasks import Request

    def results(**numbers: int) -> dict:
        return {Request(("x",), None): {"results": {"x": {"acc,none": 0.5}}, "config": numbers}}

    names = ["checkpoint", "dense"]
    same = markdown(names, [results(max_length=64), results(max_length=64)], paper=False)
    assert same.endswith("Rows are cut at 64 tokens.\n")
    other = markdown(names, [results(max_length=64), results(max_length=256)], paper=False)
    assert "64 tokens of the checkpoint and 256 tokens of the dense: longer texts do not" in other
    unknown = markdown(names, [results(max_length=64), results()], paper=False)
    assert "a length of the dense that is not said" in unknown
