"""Which of these embeddings are nearest to a query?"""

import numpy as np
from numpy.typing import NDArray

from serving.errors import InputError


def nearest(
    queries: NDArray[np.float32], embeddings: NDArray[np.float32], count: int
) -> tuple[NDArray[np.intp], NDArray[np.float32]]:
    """Exact search by cosine over unit vectors.

    Args:
        queries: float32 [q, dim], unit length.
        embeddings: float32 [n, dim], unit length.
        count: hits a query; no more than n come back.

    Returns:
        Indices [q, count] into `embeddings`, best first, and their cosines, float32 [q, count].
        Of equal cosines the lower index comes first.

    Raises:
        InputError: the two are not of the same dimension.
    """
    if queries.ndim != 2 or embeddings.ndim != 2 or queries.shape[1] != embeddings.shape[1]:
        raise InputError(
            f"queries {list(queries.shape)} and embeddings {list(embeddings.shape)} do not fit; "
            "expected [q, dim] and [n, dim] from the same model"
        )
    cosines = queries @ embeddings.T
    order = np.argsort(-cosines, axis=1, kind="stable")[:, :count]
    return order, np.take_along_axis(cosines, order, axis=1)
