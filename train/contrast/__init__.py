"""Iterative contrastive finetuning, as of Memphis-CoT: sample, verify, pair, train, average, again."""
