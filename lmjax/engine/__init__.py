"""The trainer: compiles one step, runs it, saves, resumes and reports. Knows no model, task or data set."""
