//! What Prometheus answered to a panel's queries.

use super::{
    panels::{Panel, Query},
    prometheus::Series,
};

/// The result of one query.
pub(super) struct QueryResult<'a> {
    pub(super) query: &'a Query,
    pub(super) result: Result<Vec<Series>, String>,
    /// Why the result may be empty.
    pub(super) reason: Option<String>,
}

/// The results of one panel.
pub(super) struct PanelResult<'a> {
    pub(super) panel: &'a Panel,
    pub(super) results: Vec<QueryResult<'a>>,
}

impl PanelResult<'_> {
    pub(super) fn fault(&self) -> Option<String> {
        self.results.iter().find_map(|outcome| {
            let title = &self.panel.title;
            match &outcome.result {
                Err(error) => Some(format!("{title}: {error}: {}", outcome.query.expr)),
                Ok(series) if series.is_empty() && outcome.reason.is_none() => {
                    Some(format!("{title}: no series, and no `empty_when`: {}", outcome.query.expr))
                }
                Ok(_) => None,
            }
        })
    }

    /// The series to draw.
    pub(super) fn shown(&self) -> Shown<'_> {
        let named = self.results.iter().flat_map(|outcome| {
            let series = outcome.result.as_deref().unwrap_or_default();
            series.iter().map(|series| (series.name(&outcome.query.legend), series))
        });
        let reason = self.results.iter().find_map(|outcome| outcome.reason.clone());
        Shown { series: named.collect(), reason }
    }
}

/// The series to draw of one panel.
pub(super) struct Shown<'a> {
    pub(super) series: Vec<(String, &'a Series)>,
    /// Why there is no series, if there is none.
    pub(super) reason: Option<String>,
}

#[cfg(test)]
mod tests {
    use super::{super::panels::Page, *};

    #[test]
    fn an_empty_result_without_a_reason_is_a_fault() {
        let page = Page::read().unwrap();
        let panel = page.panels().next().unwrap();
        let answer = |result, reason: Option<&str>| {
            let outcome = QueryResult { query: &panel.queries[0], result, reason: reason.map(str::to_owned) };
            PanelResult { panel, results: vec![outcome] }.fault()
        };
        assert!(answer(Ok(Vec::new()), None).is_some_and(|fault| fault.contains("no `empty_when`")));
        assert_eq!(answer(Ok(Vec::new()), Some("not there yet")), None);
        assert!(answer(Err("bad".to_owned()), Some("not there yet")).is_some());
    }
}
