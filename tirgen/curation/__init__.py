"""From many trajectories to those worth training on: filters, near-duplicates, snapshots."""
