//! Turns a job into the ordered list of methods worth trying.
//!
//! Planning is pure. What an error means for the rest of the plan is decided in `runner::run`.

use crate::job::{Job, Method, Mode, Parent, Strategy, Work};

/// The methods worth trying, the best one first; never empty. `strategies` are those that the store has for the job,
/// the best one first.
pub fn plan(job: &Job, strategies: &[Strategy]) -> Vec<Method> {
    let Work::Backup(work) = &job.work else {
        return strategies
            .iter()
            .take(1)
            .map(|strategy| Method { strategy: *strategy, mode: None })
            .collect();
    };
    let modes: &[Mode] = match work.parent {
        Parent::None => &[Mode::Full],
        // A volume that cannot be compared with its parent is better stored whole than not at all.
        Parent::Latest | Parent::Given(_) => &[Mode::Incremental, Mode::Full],
    };
    let methods = strategies.iter().flat_map(|strategy| modes.iter().map(|mode| (*strategy, *mode)));
    methods
        // A copy is of all there is. Alone it is asked all the same, so that it tells why it cannot do it.
        .filter(|method| strategies.len() == 1 || *method != (Strategy::Copy, Mode::Incremental))
        .map(|(strategy, mode)| Method { strategy, mode: Some(mode) })
        .collect()
}
