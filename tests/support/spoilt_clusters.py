"""What clusters must be where one key and one value are not finite."""

import numpy as np

# Row, token and dimension of the bad key, and of the bad value.
BAD_KEY, BAD_VALUE = (0, 10, 3), (1, 20, 5)


def check_spoilt(found, keys, values, counts):
    """Every token is in a cluster, and the bad ones show in their own clusters alone.

    Args:
        found: the clusters.
        keys, values: `[rows, tokens, head_dim]`, before the bad numbers were set.
        counts: each row's tokens.
    """
    for row, count in enumerate(counts):
        offsets, order = np.asarray(found.offsets[row]), np.asarray(found.order[row])
        assert offsets[-1] == count
        assert sorted(order[:count].tolist()) == list(range(count))
        for j in range(int((np.diff(offsets) > 0).sum())):
            members = order[offsets[j] : offsets[j + 1]]
            for means, given, bad in (
                (found.centroids, keys, BAD_KEY),
                (found.value_means, values, BAD_VALUE),
            ):
                if row == bad[0] and bad[1] in members:
                    assert np.isnan(means[row, j]).all()
                else:
                    exact = np.asarray(given[row], np.float64)[members].mean(0)
                    np.testing.assert_allclose(means[row, j], exact, atol=1e-5)
