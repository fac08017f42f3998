"""Identity of a model's embedding space. Only embeddings of the same space may be compared."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelIdentity:
    """The model that computed some embeddings.

    Embeddings of different models must not be compared, even if their dimensions are equal.
    """

    name: str
    """Display name; the same weights may be exported under several names."""
    weights_sha256: str
    embed_dim: int

    def fits(self, other: "ModelIdentity") -> bool:
        """Return whether embeddings of both may be compared: same weights, in any precision."""
        return (self.weights_sha256, self.embed_dim) == (other.weights_sha256, other.embed_dim)

    def __str__(self) -> str:
        """Return a text such as `tiny-clip (32 dimensions, weights 0123456789ab...)`."""
        return f"{self.name} ({self.embed_dim} dimensions, weights {self.weights_sha256[:12]}...)"
