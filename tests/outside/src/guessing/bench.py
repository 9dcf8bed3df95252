"""A race and a count that take milliseconds."""

import random
from statistics import fmean, median

from fewer.study import Bench

bench = Bench("guessing")


@bench.race("the mean of a thousand numbers", peer="their median", reach=100.0)
def mean_against_median():
    numbers = [random.Random(0).random() for _ in range(1000)]
    return lambda: fmean(numbers), lambda: median(numbers)


@bench.quantity("numbers read", peer="all of them", unit="numbers", reach=0.05)
def numbers_read():
    return 8, 40
