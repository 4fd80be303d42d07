"""Work items, leases and Celery: how work is handed out, done once, and recovered."""
