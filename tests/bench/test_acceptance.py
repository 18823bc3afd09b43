"""The acceptance table: what is met, what is missed, and what was not measured and why."""

from leapformer.bench.acceptance import Row, acceptance_table


def race_row(length, **speeds):
    return {
        "shape": "causal",
        "length": length,
        "pass": "forward + backward",
        "contenders": dict.fromkeys([*speeds, "SDPA"], {}),
        "not_run": {},
        "speed_over": {"SDPA": {name: {"median": speed} for name, speed in speeds.items()}},
        "share_of_peak": {name: {"median": 0.1 * speed} for name, speed in speeds.items()},
    }


def by_work(table):
    return {row[0]: row for row in table.rows}


def test_met_missed_and_stretch():
    time = [race_row(512, torch=1.1, native=1.5), race_row(1024, torch=2.0, native=6.0)]
    time[1]["not_run"] = {"research code": "too slow"}
    rows = by_work(acceptance_table({"attention": {"time": time}}))
    work = "{}, causal, forward + backward, {} tokens".format
    assert rows[work("torch", "512")][2:] == ["1.10 x", "1.00 x", "1.20 x", "yes"]
    assert rows[work("torch", "1,024")][-1] == "yes, stretch"
    assert rows[work("native", "512")][-1] == "no"
    assert rows[work("torch", "2,048")][-1] == "not measured: not among the lengths"
    assert rows["native, causal, forward + backward, lowest at 512 tokens"][2:] == ["0.15", "0.54", "0.65", "no"]


def test_a_missing_contender_is_the_reason():
    row = race_row(512, torch=1.1)
    row["contenders"].pop("SDPA")
    row["not_run"], row["speed_over"] = {"SDPA": "too slow"}, {}
    rows = by_work(acceptance_table({"attention": {"time": [row]}}))
    assert rows["torch, causal, forward + backward, 512 tokens"][-1] == "not measured: SDPA: too slow"
    assert "no native" in rows["native, causal, forward + backward, 512 tokens"][-1]


def test_memory_is_the_worst_length_and_smaller_is_better():
    memory = [{"shape": "causal", "length": n, "over_sdpa": {"torch": r}} for n, r in ((512, 1.6), (1024, 1.8))]
    rows = by_work(acceptance_table({"attention": {"memory": memory}}))
    assert rows["torch, memory, causal, highest at 1,024 tokens"][2:] == ["1.80 x", "at most 1.70 x", "-", "no"]


def test_the_long_sequence_counts_only_with_its_last_length():
    def measured(length, beyond, fresh, kept):
        paces = {"microseconds_a_token": {"median": fresh}, "microseconds_a_token_kept": {"median": kept}}
        return {"impl": "native", "length": length, "beyond_gib": beyond, **paces}

    long = [measured(16384, 0.01, 10.0, 10.0), measured(1048576, 0.2, 14.0, 10.5)]
    rows = [row for row in acceptance_table({"attention": {"long": long}}).rows if "one sequence" in row[0]]
    assert [row[-1] for row in rows] == ["yes", "yes", "no"]
    assert [row[2] for row in rows[1:]] == ["1.05 x", "1.40 x"]
    long[1] = {"impl": "native", "length": 1048576, "not_run": "not enough memory"}
    rows = [row for row in acceptance_table({"attention": {"long": long}}).rows if "one sequence" in row[0]]
    assert {row[-1] for row in rows} == {"not measured: not enough memory"}


def test_decoding_steps():
    def step(context, native):
        speed = {"torch": {"native": {"median": 100 / native}}}
        times = {"native": {"cpu_ms": {"median": native / 1000}}}
        return {"context": context, "contenders": times, "speed_over": speed}

    content = {"settings": {"clock": "cpu"}, "steps": [step(1024, 22.0), step(65536, 25.0)]}
    rows = acceptance_table({"decoding": content}).rows
    assert [row[-1] for row in rows] == ["yes", "yes", "stretch not reached"]
    assert rows[0][0].endswith("lowest at 65,536 tokens of context") and rows[0][2] == "4.00 x"


def test_a_row_without_a_reason():
    assert Row("a", "b", None, 1.0).met == "not measured"


def test_training_of_the_small_model_over_cosformer_and_softmax():
    def row(length, cosformer, softmax):
        ratios = {"cosFormer": cosformer, "softmax": softmax, "softmax, no dropout": 2.0}
        return {
            "kind": "training", "length": length, "impl": "native", "not_run": {}, "contenders": dict.fromkeys(ratios),
            "speed_over": {name: {"LeaPformer": {"median": ratio}} for name, ratio in ratios.items()},
        }  # fmt: skip

    content = {"speed": [row(1024, 0.85, 1.5), row(4096, 0.95, 9.0)]}
    rows = {(line[0], line[1]): line[2:] for line in acceptance_table({"lra": content}).rows}
    assert rows["LeaPformer (native), training, 1,024 tokens", "cosFormer"] == ["0.85 x", "0.90 x", "-", "no"]
    assert rows["LeaPformer (native), training, 4,096 tokens", "cosFormer"][-1] == "yes"
    assert rows["LeaPformer, training, 4,096 tokens", "softmax"] == ["9.00 x", "3.00 x", "-", "yes"]
    assert rows["LeaPformer, training, 4,096 tokens", "softmax, no dropout"][-1] == "no"
    (missing, *_) = acceptance_table({"lra": {"speed": []}}).rows
    assert missing[-1] == "not measured: not among the lengths"
