"""The check of a model with a method in it: what the method reaches, whether it learns, merges, and what it costs."""

from jpeft.hosts.check.check import check as check
from jpeft.hosts.check.reach import Reach as Reach
from jpeft.hosts.check.reach import reach as reach
from jpeft.hosts.check.report import Report as Report
