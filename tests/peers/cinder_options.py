#!/usr/bin/env python3
"""What the real oslo.config makes of files, for tests.

    cinder_options.py < COMMANDS

Needs the Python that `dev/cinder.sh` prints. A command is a line of JSON, {"arguments": [...], "options": [[GROUP, NAME], ...]},
with arguments such as --config-file; the answer is a line with a list of what each option is, [VALUE] or, where it is not
valid, null. It is null as a whole where the files are not valid.
"""
import itertools
import json
import logging
import sys
import warnings

warnings.filterwarnings('ignore')
logging.disable(logging.CRITICAL)

from castellan import options as castellan_opts                  # noqa: E402
from keystoneauth1 import loading                               # noqa: E402
from oslo_config import cfg                                     # noqa: E402
from oslo_db import options as db_options                       # noqa: E402
from oslo_messaging import opts as messaging_opts               # noqa: E402

from cinder import opts as cinder_opts                          # noqa: E402

KNOWN = {}
LOGIN = loading.get_auth_plugin_conf_options('password')
for option in LOGIN:
    # Cinder registers them when it logs in, which needs some of them.
    option.required = False
LISTS = [cinder_opts.list_opts(), messaging_opts.list_opts(), db_options.list_opts(), castellan_opts.list_opts(),
         [('keystone_authtoken', LOGIN), ('barbican_service_user', LOGIN)]]
for group, options in itertools.chain(*LISTS):
    for option in options:
        KNOWN.setdefault((str(group or 'DEFAULT'), option.dest), option)
KNOWN.setdefault(('DEFAULT', 'debug'), cfg.BoolOpt('debug', default=False))


def read(arguments, options):
    conf = cfg.ConfigOpts()
    for group, name in options:
        option = KNOWN[group, name]
        if (group, name) == ('database', 'connection'):
            option = cfg.StrOpt('connection', default='sqlite:///$state_path/cinder.sqlite', secret=True)
        conf.register_opt(option, group=None if group == 'DEFAULT' else group)
    try:
        conf(arguments, project='cinder', prog='cinder-backup', default_config_files=[], default_config_dirs=[])
    except (cfg.Error, ValueError):
        return None
    answer = []
    for group, name in options:
        section = conf if group == 'DEFAULT' else conf[group]
        try:
            answer.append([getattr(section, name)])
        except (cfg.Error, ValueError, RecursionError):
            answer.append(None)
    return answer


for line in sys.stdin:
    print(json.dumps(read(**json.loads(line))), flush=True)
