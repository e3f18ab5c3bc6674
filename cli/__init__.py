"""The command line of legocompress."""

import warnings

# Importing timm makes torch warn its developers; a user of the command can do nothing about it.
warnings.filterwarnings("ignore", category=FutureWarning, module="torch")
