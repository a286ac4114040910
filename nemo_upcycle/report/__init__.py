"""`nemo-upcycle report`: one HTML page about a run, from the files in the run's directory."""
