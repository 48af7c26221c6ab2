"""Analysis of compiled programs, for plans and benchmarks; also for devices that are absent."""
