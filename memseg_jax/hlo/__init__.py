"""What compiled programs are made of: counted for plans and benchmarks, also for absent devices."""
