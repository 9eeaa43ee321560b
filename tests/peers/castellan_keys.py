#!/usr/bin/env python3
"""Keys as Cinder makes and copies them, by way of Castellan, for tests.

    castellan_keys.py CINDER_CONF TOKEN COMMAND [KEY]

Needs the Python that `dev/cinder.sh` prints. Prints the id of a new key (create) or of a copy of one (clone), or one that was
found (get), as a line of JSON.
"""
import json
import logging
import sys
import warnings

warnings.filterwarnings('ignore')
logging.disable(logging.CRITICAL)

from castellan import key_manager                               # noqa: E402
from oslo_config import cfg                                     # noqa: E402

from cinder import context, keymgr                              # noqa: E402,F401
from cinder.common import config                                # noqa: E402,F401
from cinder.volume import volume_utils                          # noqa: E402

path, token, command, *ids = sys.argv[1:]
cfg.CONF(['--config-file', path], project='cinder')
user = context.RequestContext(user_id='user', project_id='project', is_admin=False, auth_token=token)
keys = key_manager.API(cfg.CONF)
if command == 'create':
    answer = keys.create_key(user, algorithm='aes', length=256)
elif command == 'clone':
    answer = volume_utils.clone_encryption_key(user, keys, ids[0])
else:
    key = keys.get(user, ids[0])
    answer = [type(key).__name__, key.algorithm, key.bit_length, key.get_encoded().hex()]
print(json.dumps(answer))
