"""The lines of a job's log that reach the screen."""

from pathlib import Path

from nemo_upcycle.cli.job_output import JobOutput

START = """\
/v/lib/site-packages/torch/cuda/__init__.py:64: FutureWarning: The pynvml package is deprecated.
  import pynvml  # type: ignore[import]
I1128 15:45:15.081000 26987 torch/distributed/run.py:747] Using nproc_per_node=2.
[default1]:/v/site-packages/megatron/core/inference/unified_memory.py:83: UserWarning: Failed to
[default1]:  warnings.warn("Failed to create unified memory mempool.")
[default0]:[NeMo W 2026-11-28 15:46:12 nemo_logger:139] No version folders would be created.
[default0]:GPU available: False, used: False
[default0]:[NeMo I 2026-11-28 15:46:13 utils:707] Number of buckets for gradient all-reduce: 1
[default0]:    Params for bucket 1 (294912 elements, 294912 padded size):
[default0]:    \tdecoder.layers.3.mlp.experts.local_experts.2.linear_fc2.weight
[default0]:[upcycle] dense → E8T2 on 2 rank(s)
[default0]:[upcycle]   step 0            exact
[default0]:  | Name   | Type | Params | Mode
[default0]:----------------------------------------
[default0]:0 | module | DDP  | 412 K  | train
[default0]:412 K     Trainable params
[default0]:[NeMo W 2026-11-28 15:46:12 nemo_logging:364] /f.py:1: UpcyclingWarning: not exact
[default0]:Training epoch 0, iteration 0/7 | lr: 0.1 | global_batch_size: 8 | global_step: 0 | x: 6
[default1]:a word of the user's own
"""
SHOWN = [
    "[upcycle] dense → E8T2 on 2 rank(s)",
    "[upcycle]   step 0            exact",
    "[NeMo W 2026-11-28 15:46:12 nemo_logging:364] /f.py:1: UpcyclingWarning: not exact",
    "Training epoch 0, iteration 0/7 | lr: 0.1 | x: 6",
    "rank 1: a word of the user's own",
]
TABLE = """\
E1128 16:01:43.499000 871 torch/distributed/elastic/multiprocessing/api.py:1002] failed
Traceback (most recent call last):
  File "torchrun", line 8, in <module>
    sys.exit(main())
torch.distributed.elastic.multiprocessing.errors.ChildFailedError:
============================================================
  exitcode  : {code} (pid: 887)
"""


def traceback(rank: int, last: str) -> str:
    lines = ("Traceback (most recent call last):", '  File "a.py", line 1, in b', "    c", last)
    return "".join(f"[default{rank}]:[rank{rank}]: {line}\n" for line in lines)


def shown(log: str) -> tuple[list[str], list[str]]:
    """Return what is shown while the job runs, and at its end."""
    output = JobOutput(Path("LOG"))
    return [each for line in log.splitlines() for each in output.feed(line)], output.end()


def test_reports_steps_and_what_is_unknown_are_shown() -> None:
    assert shown(START) == (SHOWN, [])


def test_a_users_error_is_one_line() -> None:
    cause = "nemo_upcycle.errors.UpcyclingError: model.safetensors is damaged. Get another."
    chain = "[default0]:\n[default0]:[rank0]: The above exception was the direct cause of\n"
    log = traceback(1, cause) + traceback(0, "KeyError: 1") + chain + traceback(0, cause)
    during, end = shown(START + log + TABLE.format(code=1))
    assert during == SHOWN
    assert end == [
        "Error: model.safetensors is damaged. Get another.",
        "The whole output is in LOG",
    ]


def test_ranks_that_differ_are_named() -> None:
    said = "[default1]:[upcycle] rank 1: the file is damaged.\n"
    log = said + traceback(0, "nemo_upcycle.errors.UpcyclingError: rank 1 is lost.")
    assert shown(log + TABLE.format(code=1))[1][:-1] == [
        "Error: rank 1: the file is damaged.",
        "Error: rank 0: rank 1 is lost.",
    ]


def test_a_bug_has_one_traceback() -> None:
    log = traceback(1, "ValueError: nonsense") + traceback(0, "ValueError: nonsense")
    end = shown(log + TABLE.format(code=1))[1]
    assert end.count("Traceback (most recent call last):") == 1
    assert end[-2:] == ["Error: ValueError: nonsense", "The whole output is in LOG"]


def test_a_rank_that_ends_without_a_word_shows_the_last_lines() -> None:
    end = shown(START + TABLE.format(code=-11))[1]
    assert "a word of the user's own" in end
    assert end[-2] == "Error: the job ended with exit code -11."


def test_a_traceback_that_ended_nothing_is_shown() -> None:
    during, end = shown(traceback(0, "ValueError: caught"))
    assert during == []
    assert end[-1] == "ValueError: caught"


def test_ranks_that_were_stopped_have_said_so() -> None:
    said = "[default0]:[preemption] Ctrl-C: step 3 is saved\n"
    assert shown(said + TABLE.format(code=130)) == (["[preemption] Ctrl-C: step 3 is saved"], [])
