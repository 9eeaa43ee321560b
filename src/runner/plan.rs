//! Turns a job into the ordered list of methods worth trying.
//!
//! Planning is pure. What an error means for the rest of the plan is decided in `runner::run`.

use crate::job::{Job, Method, Mode, Parent, Strategy, Work};

/// The methods worth trying, the best one first; never empty.
pub fn plan(job: &Job) -> Vec<Method> {
    let method = |mode| Method { strategy: Strategy::Chunked, mode };
    match &job.work {
        Work::Backup(work) => match work.parent {
            Parent::None => vec![method(Some(Mode::Full))],
            // A volume that cannot be compared with its parent is better stored whole than not at all.
            Parent::Latest | Parent::Given(_) => {
                vec![method(Some(Mode::Incremental)), method(Some(Mode::Full))]
            }
        },
        Work::Restore(_) | Work::Delete(_) | Work::Verify(_) => vec![method(None)],
    }
}
