"""What is settled before a job runs: knows neither transformers nor peft."""
