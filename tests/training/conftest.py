"""What is stepped here is watched for transfers between host and device."""

from tests.guards import no_hidden_transfers

__all__ = ["no_hidden_transfers"]
