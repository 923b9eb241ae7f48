// Order of the results: a guide answers a question, a lesson explains it, and a page of the reference holds every word of it.
var Scorer = {
  score: ([docname, title, anchor, descr, score]) => score + (docname.startsWith("howto/") ? 12 : docname.startsWith("course/") ? 3 : 0),
  objNameMatch: 11, objPartialMatch: 6, objPrio: {0: 15, 1: 5, 2: -5}, objPrioDefault: 0,
  title: 15, partialTitle: 7, term: 5, partialTerm: 2,
};
