"""What a run will send, hold and cost, known before it starts: rehearsed ranks, the order of calls, time, layouts."""
