// Package secrets looks for a bot's secrets in what it has written.
//
// [Collect] takes them from where they are kept: the configuration file, and the database, whose keys it opens with the pickle key. What
// is not there is handed in: the marks of message bodies ([Set.AddText]), the keys of the people's sessions ([Set.AddSessionKey]), other
// raw keys ([Set.AddKey]).
//
//	set, err := secrets.Collect(ctx, bot.ConfigPath(), otherBot.ConfigPath())
//	err = set.AddText(secrets.Body, "what people say", mark)
//	err = set.AddSessionKey("alice's session", session.SessionKey)
//	hits, err := set.ScanFile("soak/kills.log")   // or ScanFolder(dir), for every *.log in and below it
//	for _, hit := range hits { t.Error(hit) }      // soak/kills.log:1234: Megolm session key: … (base64)
//
// A bot logs in anew at every start and keeps its access token in memory alone, so that Collect finds one only if it was configured.
// Every scan therefore also reports what looks like any access token of Synapse, and what follows "Bearer " or "access_token=".
//
// # What is found
//
// A text (a password, a recovery key, a body) is found as it is, and as JSON, Go and URLs write it. A recovery key is found with and
// without its spaces. A raw key is found in standard and URL-safe base64, padded or not, at any place inside a longer run of it, in
// hexadecimal digits, as a list of decimal numbers, and as raw bytes; of each 32 bytes of it, the first 15 are enough.
//
// What is not found: a piece that is shorter, what is encrypted or compressed, and keys that were derived from a secret, or that it was
// derived from: of an Olm session only the chains of the moment of collecting are known. Collect once in a while, into one [Set].
package secrets
