"""Durable tasks: kept in a database, started when a capable server is free, run until they are terminal."""
