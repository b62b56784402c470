"""Figures that others published, to stand beside measured ones: quoted, never measured here."""

from typing import NamedTuple

# AutoAttack / standard accuracy in percent; one line a method, one column a data set and finetuning protocol.
_TABLE = """
                               | cifar10 SLF | cifar10 ALF | cifar10 AFF | cifar100 SLF | cifar100 AFF | stl10 SLF
RoCL                           | 26.1/77.9   | 29.7/75.6   | 45.0/78.5   |  8.7/42.9    | -            | 26.5/78.2
ACL                            | 39.2/78.2   | 40.6/75.5   | 49.6/81.3   | 17.3/45.8    | 24.8/57.7    | 35.8/67.9
AdvCL (ImageNet pseudo-labels) | 43.2/82.4   | 44.1/80.0   | 49.6/83.0   | 19.1/44.6    | 25.3/58.3    | -
DeACL                          | 46.1/80.8   | 45.6/79.4   | 50.8/83.6   | -            | -            | -
DynACL                         | 45.1/75.4   | 45.7/73.0   | 50.5/81.9   | 19.3/45.8    | 24.9/57.4    | 46.6/69.6
DynACL++                       | 46.5/79.8   | 48.0/78.8   | 50.3/81.9   | 20.1/52.2    | 25.2/57.3    | 47.2/70.9
DynACL-AIR++                   | 47.0/81.8   | 48.2/79.6   | 50.8/82.4   | 20.6/53.9    | 25.6/57.6    | 47.9/71.4
"""
SOURCE = "RobustSSL leaderboard; DeACL: its authors' page. ResNet-18, l_inf, eps 8/255, 10,000 test images (STL-10: 8,000)"


class Quoted(NamedTuple):
    """One published result, accuracies in [0, 1]."""

    method: str
    data: str
    protocol: str
    autoattack: float
    standard: float


def quoted(data: str) -> list[Quoted]:
    """The published results on a data set, by finetuning protocol: SLF, ALF, AFF.

    Args:
        data: name of a source as in results.json: `cifar10`, `parquet:cifar10`, `cifar100`, `stl10`; others have none.
    """
    header, *lines = [[cell.strip() for cell in line.split("|")] for line in _TABLE.strip("\n").splitlines()]
    rows = []
    for column, title in enumerate(header[1:], start=1):
        name, protocol = title.split()
        if data in (name, f"parquet:{name}"):
            for line in lines:
                if line[column] != "-":
                    robust, standard = line[column].split("/")
                    rows.append(Quoted(line[0], name, protocol, float(robust) / 100, float(standard) / 100))
    return rows
