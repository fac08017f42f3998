"""The embedding space of a model: embeddings of one space may be compared and kept in one index."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelIdentity:
    """Whose embeddings: those of two models must not be compared, whatever their dimension."""

    name: str
    """For people; the same weights may be exported under several names."""
    weights_sha256: str
    embed_dim: int

    def fits(self, other: "ModelIdentity") -> bool:
        """Whether embeddings of both may be compared: same weights, whatever the precision."""
        return (self.weights_sha256, self.embed_dim) == (other.weights_sha256, other.embed_dim)

    def __str__(self) -> str:
        """Such as `tiny-clip (32 dimensions, weights 0123456789ab...)`."""
        return f"{self.name} ({self.embed_dim} dimensions, weights {self.weights_sha256[:12]}...)"
