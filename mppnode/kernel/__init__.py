"""The node's vocabulary: requests, usage, time, tasks, faults."""
