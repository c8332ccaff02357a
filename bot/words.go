package bot

import (
	"html"
	"strings"

	"maunium.net/go/mautrix/id"

	"sendertrust/cryptohook"
)

// What people read about messages and about the bot itself: which of the texts in languages/ it is, and what is put into it. The readers have
// never heard of a master key: each answer says what is known about the sender, how sure that is, and what to do about it.

// text is one answer: a headline, what is known, and what to do.
type text struct {
	sign     string
	headline string
	known    string
	advice   string
}

// plain is the answer for clients that show no HTML.
func (t text) plain() string {
	parts := []string{t.sign + " " + t.headline, t.known}
	if t.advice != "" {
		parts = append(parts, t.advice)
	}
	return strings.Join(parts, "\n")
}

// html is the answer with its headline in bold. Every part is escaped: names in it come from strangers.
func (t text) html() string {
	parts := []string{t.sign + " <strong>" + html.EscapeString(t.headline) + "</strong>", html.EscapeString(t.known)}
	if t.advice != "" {
		parts = append(parts, "<em>"+html.EscapeString(t.advice)+"</em>")
	}
	return strings.Join(parts, "<br/>")
}

// remark adds a sentence to what is known; an empty one is none.
func (t *text) remark(sentence string) {
	if sentence != "" {
		t.known += " " + sentence
	}
}

const (
	signVerified = "✅"
	signPlain    = "ℹ️"
	signCaution  = "⚠️"
	signWarning  = "⛔"
)

// signs are what answers begin with. A verdict that is not listed is a warning.
var signs = map[cryptohook.Code]string{
	cryptohook.CodeVerified:                  signVerified,
	cryptohook.CodeUnverifiedIdentity:        signPlain,
	cryptohook.CodeNotEncrypted:              signPlain,
	cryptohook.CodeIdentityChanged:           signCaution,
	cryptohook.CodeAuthenticityNotGuaranteed: signCaution,
}

// speech is the language of a room.
func (b *Bot) speech(roomID id.RoomID) speech {
	name, set := b.config.Annotate.RoomLanguages[roomID]
	if !set {
		name = b.config.Annotate.Language
	}
	return speeches[name]
}

// explain words the verdict on a message that came under the name of sender.
func (s speech) explain(v cryptohook.Verdict, sender id.UserID) text {
	words := s.explainCode(v, sender)
	for _, userID := range namedIn(v, sender) {
		words.remark(s.lookAlike(userID))
	}
	if v.Outdated {
		words.remark(s.phrase("remark.outdated", nil))
	}
	if v.ContentWithheld && v.Code != cryptohook.CodeSessionRejected && v.Code != cryptohook.CodeMismatchedSender {
		words.remark(s.phrase("remark.withheld", nil))
	}
	return words
}

// namedIn are the users whom the words for a verdict name, each once.
func namedIn(v cryptohook.Verdict, sender id.UserID) []id.UserID {
	switch {
	case v.Code == cryptohook.CodeNotEncrypted:
		return nil
	case v.Code == cryptohook.CodeMismatchedSender && v.Reason != cryptohook.ReasonReplayed && v.UserID != sender:
		return []id.UserID{sender, v.UserID}
	case v.Code == cryptohook.CodeAuthenticityNotGuaranteed && v.Source == cryptohook.SourceHistoryBundle && v.SourceUser != sender:
		return []id.UserID{sender, v.SourceUser}
	default:
		return []id.UserID{sender}
	}
}

func (s speech) explainCode(v cryptohook.Verdict, sender id.UserID) text {
	sign, listed := signs[v.Code]
	if !listed {
		sign = signWarning
	}
	put := vars{"User": showUser(sender), "Device": s.describeDevice(v.DeviceID), "Key": groups(v.MasterKey)}
	switch v.Code {
	case cryptohook.CodeAuthenticityNotGuaranteed:
		return s.section(sign, "hearsay", s.keyOfSource(v), put, vars{"Giver": showUser(v.SourceUser)})
	case cryptohook.CodeUnableToDecrypt:
		return s.section(sign, "undecryptable", s.keyOfReason(v.Reason), put, vars{"Reason": showText(v.Reason)})
	case cryptohook.CodeMismatchedSender:
		if v.Reason == cryptohook.ReasonReplayed {
			return s.text(sign, "mismatched.replayed", put)
		}
		put["Owner"] = showUser(v.UserID)
		return s.text(sign, "mismatched.other_sender", put)
	case cryptohook.CodeSessionConflict:
		put["Claimants"] = s.describeClaimants(v.Claimants)
	}
	if key := "verdict." + string(v.Code); s.has(key + ".headline") {
		return s.text(sign, key, put)
	}
	return s.text(sign, "verdict.unheard_of", vars{"Code": showText(string(v.Code))})
}

// section gives an answer whose headline is that of a whole section of texts.
func (s speech) section(sign, section, key string, put, more vars) text {
	for name, value := range more {
		put[name] = value
	}
	return text{
		sign: sign, headline: s.phrase(section+".headline", put),
		known: s.phrase(section+"."+key+".known", put), advice: s.phrase(section+"."+key+".advice", put),
	}
}

// keyOfSource gives the text on the way by which a key came that is no proof.
func (s speech) keyOfSource(v cryptohook.Verdict) string {
	switch {
	case v.Source == cryptohook.SourceHistoryBundle && v.SourceUser == "":
		return "unknown_giver"
	case s.has("hearsay." + string(v.Source) + ".known"):
		return string(v.Source)
	default:
		return "unknown_way"
	}
}

// keyOfReason gives the text on a reason for which a message cannot be read. Texts' keys have no dots within, as withheld codes do.
func (s speech) keyOfReason(reason string) string {
	key := strings.ReplaceAll(reason, ".", "_")
	if s.has("undecryptable." + key + ".known") {
		return key
	}
	return "unheard_of"
}

func (s speech) describeDevice(deviceID id.DeviceID) string {
	if deviceID == "" {
		return s.phrase("device.unnamed", nil)
	}
	return s.phrase("device.named", vars{"Device": showDevice(deviceID)})
}

func (s speech) describeClaimants(claimants []cryptohook.Claimant) string {
	names := make([]string, 0, len(claimants))
	for _, claimant := range claimants[:min(len(claimants), 5)] {
		key := "claimant.known"
		if claimant.UserID == "" {
			key = "claimant.unknown"
		}
		names = append(names, s.phrase(key, vars{"User": showUser(claimant.UserID), "Device": s.describeDevice(claimant.DeviceID)}))
	}
	return strings.Join(names, ", ")
}

// corrected words an answer that said something else before.
func (s speech) corrected(before, now cryptohook.Verdict, sender id.UserID) text {
	words := s.explain(now, sender)
	if former := s.explain(before, sender); former.headline != words.headline {
		words.remark(s.phrase("remark.corrected", vars{"Before": former.headline}))
	}
	return words
}

// warnOf words a warning of its own: what was said about somebody's messages before holds no longer.
func (s speech) warnOf(before, now cryptohook.Verdict, sender id.UserID) text {
	each := s.explain(now, sender)
	return s.text(each.sign, "warning", vars{
		"User": showUser(sender), "Before": s.explain(before, sender).headline,
		"Headline": each.headline, "Known": each.known, "Advice": each.advice,
	})
}

// doubtInMyself tells a room that nobody can check for now that it is the bot who answers.
func (s speech) doubtInMyself(own cryptohook.OwnIdentity) text {
	known := "own_identity.doubt.known." + string(own.State)
	if !s.has(known) {
		known = "own_identity.doubt.known.signature_missing"
	}
	return text{signWarning, s.phrase("own_identity.doubt.headline", nil), s.phrase(known, nil), s.phrase("own_identity.doubt.advice", nil)}
}

// trustInMyself takes it back.
func (s speech) trustInMyself() text { return s.text(signPlain, "own_identity.trust", nil) }

// stoppedAnswering tells a room that a sender's messages are not answered for now; without a sender, that most are not.
func (s speech) stoppedAnswering(sender id.UserID) text {
	if sender == "" {
		return s.text(signCaution, "limits.stopped_room", nil)
	}
	return s.text(signCaution, "limits.stopped_sender", vars{"User": showUser(sender)})
}

// answeringAgain tells a room that what it was told by stoppedAnswering is over.
func (s speech) answeringAgain(sender id.UserID, unanswered int) text {
	key, put := "limits.again_sender", vars{"User": showUser(sender)}
	if sender == "" {
		key = "limits.again_room"
	}
	return text{signPlain, s.phrase(key+".headline", put), s.counted(key+".known", unanswered, put), s.phrase(key+".advice", put)}
}

// groups writes a key in groups of four, as apps show it.
func groups(key id.Ed25519) string {
	var written strings.Builder
	for i, letter := range key {
		if i > 0 && i%4 == 0 {
			written.WriteByte(' ')
		}
		written.WriteRune(letter)
	}
	return written.String()
}
