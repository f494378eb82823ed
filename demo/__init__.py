"""The project's own demonstration: real digits, synthetic speech, judges, metrics and the report. Not in the wheel."""
