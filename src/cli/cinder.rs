//! A worker in the place of Cinder's backup service.

use std::path::PathBuf;

use tracing::warn;

use super::{Error, until_stopped};
use crate::cinder::conf::{Conf, Settings, Source};
use crate::stand_in;

/// Works with the files of Cinder's configuration, until told to stop.
pub(super) async fn work(files: Vec<PathBuf>, folders: Vec<PathBuf>) -> Result<u8, Error> {
    let files = files.into_iter().map(Source::File);
    let sources: Vec<Source> = files.chain(folders.into_iter().map(Source::Dir)).collect();
    let settings = Settings::read(&sources)?;
    let conf = Conf::new(&settings)?;
    for (option, why) in settings.not_obeyed() {
        warn!(option, why, "an option of cinder.conf is not obeyed");
    }
    until_stopped(|shutdown| stand_in::work(conf, shutdown)).await
}
