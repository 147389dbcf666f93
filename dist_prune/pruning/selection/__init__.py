"""From scores to a plan: rankings, costs, schedules."""
