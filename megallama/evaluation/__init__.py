"""What a model is worth on given text: `megallama eval`, and the tasks of lm-evaluation-harness."""
