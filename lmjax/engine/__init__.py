"""The trainer: compiles a step, runs it, saves, resumes, reports. Knows no model, task or data."""
