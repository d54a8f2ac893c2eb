//! Whether a template wants content as one string or as a list of parts.
//!
//! vLLM looks for a loop over a message's content in the template's syntax tree: such a template takes parts, any
//! other takes strings. What it accepts as "a message" and "its content" is followed here rule by rule
//! (vLLM 0.32, `vllm/renderers/hf.py`), its blind spots included, since a different answer changes every prompt.

use crate::model::ContentFormat;
use minijinja::machinery::{ast, parse};
use minijinja::syntax::SyntaxConfig;

/// The format that vLLM finds for the template; strings if it cannot be parsed.
pub(super) fn content_format(source: &str) -> ContentFormat {
    let Ok(syntax) = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build() else {
        return ContentFormat::String;
    };
    match parse(source, "chat", syntax) {
        Ok(root) => {
            let mut nodes = Nodes::default();
            nodes.statement(&root);
            if nodes.loops_over_content().unwrap_or(false) {
                ContentFormat::Parts
            } else {
                ContentFormat::String
            }
        }
        Err(_) => ContentFormat::String,
    }
}

/// A loop target or assignment that is not a plain name: vLLM gives up and takes strings.
struct NotAName;

/// The parts of the tree that count, in no particular order of nesting.
#[derive(Default)]
struct Nodes<'n, 's> {
    assigns: Vec<(&'n ast::Expr<'s>, &'n ast::Expr<'s>)>,
    loops: Vec<(&'n ast::ForLoop<'s>, Option<usize>)>,
    macros: Vec<&'n ast::Macro<'s>>,
    calls: Vec<&'n ast::Call<'s>>,
    inside: Option<usize>,
}

impl<'n, 's> Nodes<'n, 's> {
    fn loops_over_content(&self) -> Result<bool, NotAName> {
        let messages = self.aliases("messages")?;
        let mut message_names = Vec::new();
        for (looped, _) in &self.loops {
            if messages.iter().any(|name| is_access(&looped.iter, name, None)) {
                message_names.push(name(&looped.target)?);
            }
        }
        let is_content =
            |e: &ast::Expr<'_>| message_names.iter().any(|name| is_access(e, name, Some("content")));
        // Parameters of each macro that some call fills with a message's content.
        let filled: Vec<Vec<&str>> = self
            .macros
            .iter()
            .map(|m| {
                let parameters: Vec<&str> = m.args.iter().filter_map(|a| name(a).ok()).collect();
                let mut filled = Vec::new();
                for call in self.calls.iter().filter(|c| is_access(&c.expr, m.name, None)) {
                    let mut position = 0;
                    for argument in &call.args {
                        match argument {
                            ast::CallArg::Pos(e) => {
                                if is_content(e) {
                                    filled.extend(parameters.get(position));
                                }
                                position += 1;
                            }
                            ast::CallArg::Kwarg(key, e) if parameters.contains(key) && is_content(e) => {
                                filled.push(*key);
                            }
                            _ => {}
                        }
                    }
                }
                filled
            })
            .collect();
        for (looped, inside) in &self.loops {
            let plain = name(&looped.iter).ok();
            let found = is_content(&looped.iter)
                || match (inside, plain) {
                    (Some(i), Some(plain)) => filled[*i].contains(&plain),
                    (None, Some(plain)) => plain == "content",
                    _ => false,
                };
            if found {
                return name(&looped.target).map(|_| true);
            }
        }
        Ok(false)
    }

    /// `variable` and every name that is assigned from it or from one of its aliases.
    fn aliases(&self, variable: &'s str) -> Result<Vec<&'s str>, NotAName> {
        let mut names = vec![variable];
        let mut next = 0;
        while let Some(current) = names.get(next).copied() {
            next += 1;
            for (target, value) in &self.assigns {
                if is_access(value, current, None) {
                    let target = name(target)?;
                    if !names.contains(&target) {
                        names.push(target);
                    }
                }
            }
        }
        Ok(names)
    }

    fn body(&mut self, body: &'n [ast::Stmt<'s>]) {
        for statement in body {
            self.statement(statement);
        }
    }

    fn statement(&mut self, statement: &'n ast::Stmt<'s>) {
        match statement {
            ast::Stmt::Template(t) => self.body(&t.children),
            ast::Stmt::EmitExpr(e) => self.expression(&e.expr),
            ast::Stmt::ForLoop(f) => {
                self.loops.push((f, self.inside));
                self.expression(&f.iter);
                if let Some(filter) = &f.filter_expr {
                    self.expression(filter);
                }
                self.body(&f.body);
                self.body(&f.else_body);
            }
            ast::Stmt::IfCond(i) => {
                self.expression(&i.expr);
                self.body(&i.true_body);
                self.body(&i.false_body);
            }
            ast::Stmt::WithBlock(w) => {
                for (_, value) in &w.assignments {
                    self.expression(value);
                }
                self.body(&w.body);
            }
            ast::Stmt::Set(s) => {
                self.assigns.push((&s.target, &s.expr));
                self.expression(&s.expr);
            }
            ast::Stmt::SetBlock(s) => self.body(&s.body),
            ast::Stmt::AutoEscape(a) => self.body(&a.body),
            ast::Stmt::FilterBlock(f) => self.body(&f.body),
            ast::Stmt::Block(b) => self.body(&b.body),
            ast::Stmt::Macro(m) => self.macro_(m),
            ast::Stmt::CallBlock(c) => {
                self.call(&c.call);
                self.body(&c.macro_decl.body);
            }
            ast::Stmt::Do(d) => self.call(&d.call),
            ast::Stmt::EmitRaw(_)
            | ast::Stmt::Import(_)
            | ast::Stmt::FromImport(_)
            | ast::Stmt::Extends(_)
            | ast::Stmt::Include(_)
            | ast::Stmt::Continue(_)
            | ast::Stmt::Break(_) => {}
        }
    }

    fn macro_(&mut self, m: &'n ast::Macro<'s>) {
        let outer = self.inside.replace(self.macros.len());
        self.macros.push(m);
        self.body(&m.body);
        self.inside = outer;
    }

    fn call(&mut self, call: &'n ast::Call<'s>) {
        self.calls.push(call);
        self.expression(&call.expr);
        self.arguments(&call.args);
    }

    fn arguments(&mut self, arguments: &'n [ast::CallArg<'s>]) {
        for argument in arguments {
            match argument {
                ast::CallArg::Pos(e)
                | ast::CallArg::Kwarg(_, e)
                | ast::CallArg::PosSplat(e)
                | ast::CallArg::KwargSplat(e) => self.expression(e),
            }
        }
    }

    /// Only calls count inside expressions.
    fn expression(&mut self, expression: &'n ast::Expr<'s>) {
        match expression {
            ast::Expr::Var(_) | ast::Expr::Const(_) => {}
            ast::Expr::Slice(s) => {
                self.expression(&s.expr);
                for part in [&s.start, &s.stop, &s.step].into_iter().flatten() {
                    self.expression(part);
                }
            }
            ast::Expr::UnaryOp(u) => self.expression(&u.expr),
            ast::Expr::BinOp(b) => {
                self.expression(&b.left);
                self.expression(&b.right);
            }
            ast::Expr::Compare(c) => {
                self.expression(&c.expr);
                for op in &c.ops {
                    self.expression(&op.expr);
                }
            }
            ast::Expr::IfExpr(i) => {
                self.expression(&i.test_expr);
                self.expression(&i.true_expr);
                if let Some(e) = &i.false_expr {
                    self.expression(e);
                }
            }
            ast::Expr::Filter(f) => {
                if let Some(e) = &f.expr {
                    self.expression(e);
                }
                self.arguments(&f.args);
            }
            ast::Expr::Test(t) => {
                self.expression(&t.expr);
                self.arguments(&t.args);
            }
            ast::Expr::GetAttr(g) => self.expression(&g.expr),
            ast::Expr::GetItem(g) => {
                self.expression(&g.expr);
                self.expression(&g.subscript_expr);
            }
            ast::Expr::Call(c) => self.call(c),
            ast::Expr::List(l) => l.items.iter().for_each(|e| self.expression(e)),
            ast::Expr::Tuple(t) => t.items.iter().for_each(|e| self.expression(e)),
            ast::Expr::Map(m) => m.keys.iter().chain(&m.values).for_each(|e| self.expression(e)),
        }
    }
}

fn name<'s>(expression: &ast::Expr<'s>) -> Result<&'s str, NotAName> {
    match expression {
        ast::Expr::Var(v) => Ok(v.id),
        _ => Err(NotAName),
    }
}

/// `variable`, or its `key`, seen through filters, tests and slices.
fn is_access(expression: &ast::Expr<'_>, variable: &str, key: Option<&str>) -> bool {
    match (expression, key) {
        (ast::Expr::Filter(f), _) => f.expr.as_ref().is_some_and(|e| is_access(e, variable, key)),
        (ast::Expr::Test(t), _) => is_access(&t.expr, variable, key),
        (ast::Expr::Slice(s), _) => is_access(&s.expr, variable, key),
        (ast::Expr::Var(v), None) => v.id == variable,
        (ast::Expr::GetAttr(g), Some(key)) => g.name == key && is_plain(&g.expr, variable),
        (ast::Expr::GetItem(g), Some(key)) => {
            is_plain(&g.expr, variable)
                && matches!(&g.subscript_expr, ast::Expr::Const(c) if c.value.as_str() == Some(key))
        }
        _ => false,
    }
}

fn is_plain(expression: &ast::Expr<'_>, variable: &str) -> bool {
    matches!(expression, ast::Expr::Var(v) if v.id == variable)
}
