"""The stack without Docker: a real Kafka and a real TimescaleDB, installed from the package registries."""
