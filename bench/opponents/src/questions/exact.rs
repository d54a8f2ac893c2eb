//! How often is each index wrong, in the regimes of [`exactness`](crate::exactness)?

use crate::exactness::{REGIMES, judge};
use crate::questions::Plan;
use crate::record::Sheet;

/// Judges every index by the oracle.
pub fn run(plan: &Plan) -> anyhow::Result<()> {
    let mut sheet = Sheet::begin(&plan.folder, "exact", 1, plan.quick)?;
    for regime in REGIMES {
        for mut lane in plan.lanes(true) {
            let wrong = judge(lane.as_mut(), regime, plan.size(20, 5) as u64, 400);
            sheet.row(&[("regime", &regime.name)], lane.ways()[0], &[], Some(wrong));
        }
    }
    sheet.end()
}
