"""What a command shows at its end: tables, pictures and latencies."""
