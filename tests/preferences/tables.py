"""Tables of labels from the literature, as their papers print them; NaN where there is no label."""

import numpy as np

_ = np.nan

# Krippendorff 2011, "Computing Krippendorff's alpha-reliability", section C: four observers (rows) of twelve units.
KRIPPENDORFF = np.array(
    [
        [1, 2, 3, 3, 2, 1, 4, 1, 2, _, _, _],
        [1, 2, 3, 3, 2, 2, 4, 1, 2, 5, _, 3],
        [_, 3, 3, 3, 2, 3, 4, 2, 2, 5, 1, _],
        [1, 2, 3, 3, 2, 4, 4, 1, 2, 5, 1, _],
    ]
).T

# Fleiss 1971, table 1: how many of six psychiatrists gave each of thirty patients one of five diagnoses.
FLEISS = """
00060 03003 01401 00006 03030 20400 00402 20310 20040 00006 10050 11040 03300 10050 02031
00501 30012 51000 02040 10203 00006 01050 02013 20040 10041 05010 40002 02040 10500 00006
"""

# The example that textbooks and encyclopedias repeat: fourteen raters, ten subjects, five categories.
FOURTEEN = [
    [0, 0, 0, 0, 14],
    [0, 2, 6, 4, 2],
    [0, 0, 3, 5, 6],
    [0, 3, 9, 2, 0],
    [2, 2, 8, 1, 1],
    [7, 7, 0, 0, 0],
    [3, 2, 6, 3, 0],
    [2, 5, 3, 2, 2],
    [6, 5, 2, 1, 0],
    [0, 2, 2, 3, 7],
]

# Dawid & Skene 1979, table 1: 45 patients; anaesthetist 1 judged each three times, the others once.
ANAESTHETISTS = """
1111111 3334334 1122122 2223121 2223222 2223322 1222111 3333433 2222223 2322223 4444444 2223343 1111111 2223212 1211111
1112111 1111111 1111111 2222221 2221322 2222222 2222221 2223222 2212222 1111111 1111111 2322222 1111111 1111111 1121121
1111111 3333233 1111111 2222222 2223232 4334343 2212232 2323233 3333432 1111111 1111111 1212111 2322222 1211111 2222222
"""


def digits(text: str) -> np.ndarray:
    """One row per word, one column per digit."""
    return np.array([[int(digit) for digit in word] for word in text.split()], dtype=float)


def labels_of(counts) -> np.ndarray:
    """A table of labels in which each item has each label as often as counts [N, C] say."""
    return np.array([np.repeat(np.arange(len(row)), np.asarray(row, dtype=int)) for row in counts], dtype=float)
