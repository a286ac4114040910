"""What torchrun prints of ranks that have failed."""

REPORT = """
[0]:
  time      : 2026-11-28_15:00:00
  host      : node
  rank      : 0 (local_rank: 0)
  exitcode  : -15 (pid: 11)
  error_file: <N/A>
  traceback : Signal 15 (SIGTERM) received by PID 11
------------------------------------------------------------
Root Cause (first observed failure):
[1]:
  time      : 2026-11-28_15:00:00
  host      : node
  rank      : 1 (local_rank: 1)
  exitcode  : -9 (pid: 12)
  error_file: <N/A>
  traceback : Signal 9 (SIGKILL) received by PID 12
"""
