"""What a local job of NeMo-Run prints on the screen: reports, steps, and the cause of a failure.

NeMo-Run copies a job's whole log to the screen: hundreds of lines, and for a failure the tracebacks
of every rank and torchrun's table. The log file still has them all.
"""

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from nemo_upcycle.cli import noise
from nemo_upcycle.engine.launch import killed_ranks

_RANK = re.compile(r"\[default(\d+)\]:(?:\[rank\d+\]: ?)?")
_LAUNCHER = re.compile(r"[IWE]\d{4} \d\d:\d\d:\d\d\.\d+ ")
_TRACEBACK = "Traceback (most recent call last):"
_BETWEEN = re.compile("The above exception was the direct cause|During handling of the above")
_ON_RANK = re.compile(r"\[\w+\] rank \d+: (.*)")
_UPCYCLING = re.compile(r"(?:[\w.]+\.)?UpcyclingError: (.*)")
_EXIT = re.compile(r" +exitcode +: (-?\d+)")
_STOPPED = {"130", "143", "-2", "-15"}
"""Exit codes of ranks that a signal has stopped; they have said so."""

_REPEATED = re.compile(r"global_batch_size: \d+ \| global_step: \d+ \| ")
_LAST_LINES = 20


class JobOutput:
    """The lines of a job's log, of which some are shown.

    Args:
        log: The log file, named after a failure.
    """

    def __init__(self, log: Path | None = None) -> None:
        self._log = log
        self._hidden: dict[str, bool] = {}
        self._open: dict[str, bool] = {}
        self._tracebacks: dict[str, list[str]] = {}
        self._causes: dict[str, str] = {}
        self._table: list[str] = []
        self._last: list[str] = []

    def feed(self, line: str) -> list[str]:
        """Return what the screen shows for a line of the log: nothing, or one line."""
        line = line.rstrip("\n")
        matched = _RANK.match(line)
        rank, text = (matched[1], line[matched.end() :]) if matched else ("", line)
        if not rank and (self._table or text == _TRACEBACK):
            self._table.append(text)
            return []
        self._last = [*self._last[1 - _LAST_LINES :], text]
        if self._in_traceback(rank, text) or self._is_noise(rank, text):
            return []
        if rank and (said := _ON_RANK.fullmatch(text)):
            self._causes.setdefault(rank, f"Error: {said[1]}")
            return []
        text = _REPEATED.sub("", text)
        return [f"rank {rank}: {text}" if rank not in ("", "0") else text]

    def end(self) -> list[str]:
        """Return what the screen shows at the job's end: the cause of a failure."""
        if not self._table:  # whatever was caught did not end the job
            return [line for lines in self._tracebacks.values() for line in lines]
        if killed_ranks("\n".join(self._table)):  # which is reported elsewhere
            return self._where()
        by_cause: dict[str, list[str]] = {}
        for rank, cause in self._causes.items():
            by_cause.setdefault(cause, []).append(rank)
        shown = []
        for cause, ranks in by_cause.items():
            if not cause.startswith("Error: "):
                shown += self._tracebacks[ranks[0]]
            who = f"rank {','.join(sorted(ranks))}: " if len(by_cause) > 1 else ""
            shown.append(f"Error: {who}{cause.removeprefix('Error: ')}")
        codes = sorted({found[1] for found in map(_EXIT.match, self._table) if found})
        if not shown and set(codes) <= _STOPPED:
            return []
        if not shown:
            shown = [*self._last, f"Error: the job ended with exit code {', '.join(codes)}."]
        return shown + self._where()

    def _where(self) -> list[str]:
        return [f"The whole output is in {self._log}"] if self._log else []

    def _in_traceback(self, rank: str, text: str) -> bool:
        """Keep a traceback's line; the last line is the cause."""
        kept = self._tracebacks.setdefault(rank, []) if rank else []
        if not rank:
            return False
        if text == _TRACEBACK or _BETWEEN.match(text):
            kept.append(text)
            self._open[rank] = text == _TRACEBACK
            return True
        if kept and not text.strip():
            kept.append(text)
            return True
        if not self._open.get(rank):
            return False
        kept.append(text)
        if not text.startswith(" "):
            self._open[rank] = False
            ours = _UPCYCLING.match(text)
            self._causes[rank] = f"Error: {ours[1]}" if ours else text
        return True

    def _is_noise(self, rank: str, text: str) -> bool:
        """Return whether a line is a library's, or continues such a line."""
        continued = self._hidden.get(rank, False) and (not text.strip() or text[0] in " \t")
        known = bool((_LAUNCHER if not rank else noise.RECORDS).match(text))
        self._hidden[rank] = continued or known or bool(noise.RECORDS.search(text))
        return self._hidden[rank]


def listen() -> None:
    """Filter the output of local jobs from here on."""
    from nemo_run.run import logs

    print_all = logs.print_log_lines

    def print_log_lines(
        file: Any, runner: Any, handle: str, role: str, replica: int, *arguments: Any, **named: Any
    ) -> None:
        if noise.verbose() or not handle.startswith("local"):
            print_all(file, runner, handle, role, replica, *arguments, **named)
            return
        there = runner.describe(handle)
        url = getattr(runner.status(handle), "ui_url", None) or getattr(there, "ui_url", None)
        log = Path(url.removeprefix("file://"), role, str(replica), "combined.log") if url else None
        output = JobOutput(log)
        regex, should_tail, exceptions, streams = arguments[:4]
        try:
            lines: Iterable[str] = runner.log_lines(
                handle, role, replica, regex, None, None, should_tail=should_tail, streams=streams
            )
            if log is not None:
                print(f"[nemo-upcycle] The whole output goes to {log}", file=file, flush=True)
            for line in lines:
                for shown in output.feed(line):
                    print(shown, file=file, flush=True)
            for shown in output.end():
                print(shown, file=file, flush=True)
        except Exception as error:
            exceptions.put(error)
            raise

    logs.print_log_lines = print_log_lines


@contextmanager
def quiet_launch(context: Any) -> Iterator[None]:
    """Hide what NeMo-Run prints about a local job that a user has already said yes to.

    Args:
        context: NeMo-Run's `RunContext`.
    """
    import logging

    import nemo_run as run
    from nemo_run.core.frontend.console.api import CONSOLE

    local = context.executor is None or isinstance(context.executor, run.LocalExecutor)
    if noise.verbose() or not local or context.dryrun or not context.skip_confirmation:
        yield
        return
    before = run.dryrun_fn, CONSOLE.log, CONSOLE.print, CONSOLE.rule
    log, show = CONSOLE.log, CONSOLE.print

    def about_errors(write: Any) -> Any:
        def maybe(*objects: Any, **named: Any) -> None:
            if any(re.search("Error|Exception|Traceback|bold red", str(each)) for each in objects):
                write(*objects, **named)

        return maybe

    def print_records(*objects: Any, **named: Any) -> None:
        # Logging prints records, which are tables; NeMo-Run prints strings and code.
        known = any(type(each).__name__ in ("Table", "Traceback") for each in objects)
        (show if known else about_errors(show))(*objects, **named)

    logger = logging.getLogger("nemo_run")
    level = logger.level
    logger.setLevel(logging.ERROR)
    run.dryrun_fn = lambda *_, **__: None
    CONSOLE.log, CONSOLE.print, CONSOLE.rule = about_errors(log), print_records, _nothing
    try:
        yield
    finally:
        run.dryrun_fn, CONSOLE.log, CONSOLE.print, CONSOLE.rule = before
        logger.setLevel(level)


def _nothing(*_: Any, **__: Any) -> None: ...
