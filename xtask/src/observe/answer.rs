//! What Prometheus answered to a panel's queries.

use super::{
    panels::{Panel, Query},
    prometheus::Series,
};

/// What came of one query.
pub(super) struct Outcome<'a> {
    pub(super) query: &'a Query,
    pub(super) result: Result<Vec<Series>, String>,
    /// Why there may be nothing.
    pub(super) excuse: Option<String>,
}

/// What came of one panel.
pub(super) struct Answer<'a> {
    pub(super) panel: &'a Panel,
    pub(super) results: Vec<Outcome<'a>>,
}

impl Answer<'_> {
    pub(super) fn fault(&self) -> Option<String> {
        self.results.iter().find_map(|outcome| {
            let title = &self.panel.title;
            match &outcome.result {
                Err(error) => Some(format!("{title}: {error}: {}", outcome.query.expr)),
                Ok(series) if series.is_empty() && outcome.excuse.is_none() => {
                    Some(format!("{title}: nothing, and no reason stated: {}", outcome.query.expr))
                }
                Ok(_) => None,
            }
        })
    }

    /// What is drawn of it.
    pub(super) fn shown(&self) -> Shown<'_> {
        let named = self.results.iter().flat_map(|outcome| {
            let series = outcome.result.as_deref().unwrap_or_default();
            series.iter().map(|series| (series.name(&outcome.query.legend), series))
        });
        let excuse = self.results.iter().find_map(|outcome| outcome.excuse.clone());
        Shown { series: named.collect(), excuse }
    }
}

/// What is drawn of one panel.
pub(super) struct Shown<'a> {
    pub(super) series: Vec<(String, &'a Series)>,
    /// Why there is nothing, if there is not.
    pub(super) excuse: Option<String>,
}

#[cfg(test)]
mod tests {
    use super::{super::panels::Page, *};

    #[test]
    fn nothing_without_a_reason_is_a_fault() {
        let page = Page::read().unwrap();
        let panel = page.panels().next().unwrap();
        let answer = |result, excuse: Option<&str>| {
            let outcome = Outcome { query: &panel.queries[0], result, excuse: excuse.map(str::to_owned) };
            Answer { panel, results: vec![outcome] }.fault()
        };
        assert!(answer(Ok(Vec::new()), None).is_some_and(|fault| fault.contains("no reason stated")));
        assert_eq!(answer(Ok(Vec::new()), Some("not there yet")), None);
        assert!(answer(Err("bad".to_owned()), Some("not there yet")).is_some());
    }
}
