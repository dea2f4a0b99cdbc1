"""LongBench and LongBench-E (Bai et al., ACL 2024, github.com/THUDM/LongBench): data, prompts, metrics, averages."""
