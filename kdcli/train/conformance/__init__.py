"""What every objective must satisfy, measured through its public interface: `kdcli verify` and the tests run it."""
