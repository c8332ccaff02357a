package bot

import (
	"fmt"
	"html"
	"strings"

	"maunium.net/go/mautrix/event"
	"maunium.net/go/mautrix/id"

	"sendertrust/cryptohook"
)

// What people read. They have never heard of a master key: each answer says what is known about the sender, how sure that is,
// and what to do about it.

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

const (
	signVerified = "✅"
	signPlain    = "ℹ️"
	signCaution  = "⚠️"
	signWarning  = "⛔"
)

// explain words the verdict on a message that came under the name of sender.
func explain(v cryptohook.Verdict, sender id.UserID) text {
	words := explainCode(v, sender)
	if v.Outdated {
		words.known += " (The server has not answered in time what devices this person has now; this is from what was known before.)"
	}
	if v.ContentWithheld && v.Code != cryptohook.CodeSessionRejected && v.Code != cryptohook.CodeMismatchedSender {
		words.known += " This bot is set up to work with messages of proven senders only, and did not read it."
	}
	return words
}

func explainCode(v cryptohook.Verdict, sender id.UserID) text {
	name, device := clip(sender.String()), describeDevice(v.DeviceID)
	switch v.Code {
	case cryptohook.CodeVerified:
		return text{signVerified, "Verified: this is really " + name + ".",
			"It was sent from " + device + ", which this person has confirmed as their own, and the operator of this bot has checked that the account belongs to them.",
			""}
	case cryptohook.CodeUnverifiedIdentity:
		return text{signPlain, "From the account " + name + ", not verified in person.",
			"It was sent from " + device + ", which the owner of the account has confirmed as their own. Nobody has checked for this bot who the owner is.",
			"If it matters who they are, compare the account's public key with them over another channel, for example face to face, and have the operator of this bot note it as verified: " + groups(v.MasterKey)}
	case cryptohook.CodeIdentityChanged:
		return text{signCaution, "The identity of " + name + " has changed.",
			"It was sent from " + device + ", which its owner has confirmed, but with other keys than this bot saw first. People change them when they lose all their devices; somebody who takes over an account does, too.",
			"Ask them over another channel whether they have reset their encryption identity, before you rely on this message."}
	case cryptohook.CodeVerificationViolation:
		return text{signWarning, "The verified identity of " + name + " has been replaced.",
			"This person was verified, and the account now uses an identity that was not. They may have reset their encryption, or somebody else has taken over the account.",
			"Do not act on this message. Ask them over another channel, then have the operator of this bot verify the new identity."}
	case cryptohook.CodeUnsignedDevice:
		return text{signWarning, "Sent from a device that " + name + " has not confirmed.",
			"It came from " + device + ". The account's owner has not confirmed this device as their own, so anybody who got into the account could have added it.",
			"Do not rely on this message. If you are " + name + ": confirm it from another device of yours (\"verify this device\"), or set up encryption in its settings if it is your only one."}
	case cryptohook.CodeUnknownDevice:
		return text{signWarning, "Sent from an unknown device.",
			"The server says that " + name + " sent this, but the account has no device with the keys that were used. It may have been logged out since.",
			"Do not rely on this message. Ask " + name + " to send it again."}
	case cryptohook.CodeAuthenticityNotGuaranteed:
		return hearsay(v, name)
	case cryptohook.CodeMismatchedSender:
		return mismatched(v, name)
	case cryptohook.CodeSessionConflict:
		return text{signWarning, "Two devices claim to have sent this.",
			"The key to this message came from more than one device: " + describeClaimants(v.Claimants) + ". At most one of them tells the truth.",
			"Do not rely on this message. Ask " + name + " to send it again."}
	case cryptohook.CodeSessionRejected:
		return text{signWarning, "Rejected: a signature on the sender's device is forged.",
			"It came under the name of " + name + " from " + device + ", with a confirmation by the account's owner that is not genuine. The message was not decrypted.",
			"Do not trust anything from this device. Tell " + name + " over another channel that somebody may be using their account."}
	case cryptohook.CodeSentInClear:
		return text{signWarning, "Sent without encryption in an encrypted room.",
			"Anybody with access to a server of this room could have written it under the name of " + name + ", and can read it.",
			"Do not rely on this message. Ask " + name + " to check their app: it should encrypt everything here."}
	case cryptohook.CodeUnableToDecrypt:
		return undecryptable(v, name)
	case cryptohook.CodeNotEncrypted:
		return text{signPlain, "This room is not encrypted.",
			"Messages here are not signed by anybody's device. That they are from the people whose names they carry rests on the word of the servers alone.",
			"Switch encryption on in the room's settings if it matters who writes. Until then I stay quiet here; mention me to ask again."}
	}
	return text{signWarning, "It is not known who sent this.", "This bot has no word for the case " + clip(string(v.Code)) + ".", "Do not rely on this message."}
}

// corrected words an answer that said something else before.
func corrected(before, now cryptohook.Verdict, sender id.UserID) text {
	words := explain(now, sender)
	if former := explain(before, sender); former.headline != words.headline {
		words.known += " (Corrected: this answer said “" + former.headline + "” before.)"
	}
	return words
}

// warnOf words a warning of its own: what was said about somebody's messages before holds no longer.
func warnOf(before, now cryptohook.Verdict, sender id.UserID) text {
	words := explain(now, sender)
	words.known = "I said “" + explain(before, sender).headline + "” about earlier messages of " + clip(sender.String()) +
		" here. That no longer holds, and I am correcting my answers. " + ofSeveral.Replace(words.known)
	words.headline, words.advice = ofSeveral.Replace(words.headline), ofSeveral.Replace(words.advice)
	return words
}

// doubtInMyself tells a room that nobody can check for now that it is the bot who answers.
func doubtInMyself(own cryptohook.OwnIdentity) text {
	words := text{signWarning, "Do not rely on me for now.", "",
		"Until I say that it is over, do not believe what is said in my name, and ask the operator of this bot. I answer nothing before that; what you write meanwhile I answer afterwards."}
	switch own.State {
	case cryptohook.OwnOtherIdentity:
		words.known = "The server shows another encryption identity for my account than the one that I have. Somebody may have taken over the account, or the server is wrong."
	case cryptohook.OwnDeviceMissing:
		words.known = "The server no longer lists the device that I use. Somebody may have removed it, or the server is wrong."
	case cryptohook.OwnDeviceChanged:
		words.known = "The server shows other keys for my device than the ones that I have. Somebody may be using my account, or the server is wrong."
	default:
		words.known = "The server does not show that the device that I use is mine. You cannot check that it is me who answers."
	}
	return words
}

// trustInMyself takes it back.
func trustInMyself() text {
	return text{signPlain, "I am answering again.",
		"The server shows my own device and my encryption identity as I have them. What was written meanwhile I answer now.",
		"If your app warns about anything that was said in my name meanwhile, do not believe it."}
}

// ofSeveral makes what is said of one message fit several.
var ofSeveral = strings.NewReplacer(
	"this message", "those messages", "send it again", "send them again", "sent this", "sent those", "Treat it", "Treat them", "Believe it", "Believe them",
	"It was sent", "They were sent", "It came", "They came", "The message was", "The messages were",
)

// hearsay words that the key to a message did not come from its sender: by which way it did, how much that is worth, and what to do.
func hearsay(v cryptohook.Verdict, name string) text {
	t := text{signCaution, "It cannot be proven who sent this.", "", "Treat it as hearsay. Ask " + name + " to send it again if it matters."}
	switch v.Source {
	case cryptohook.SourceBackup:
		t.known = "The key to this message came from this bot's key backup on the server, not from its sender. The server could have put a key of its own there. It says that " + name + " sent this."
	case cryptohook.SourceForwarded:
		t.known = "The key to this message did not come from its sender, but from another device of this bot's own account, which has sent it on. That device is genuine; from whom it had the key is not proven. The server says that " + name + " sent this."
		t.advice = "It is probably what it seems, but not proven. Ask " + name + " to send it again if it matters."
	case cryptohook.SourceHistoryBundle:
		giver := clip(v.SourceUser.String())
		if giver == "" {
			giver = "whoever invited this bot"
		}
		t.known = "The key to this message came from " + giver + ", together with the invitation to this room, not from its sender. That " + name + " sent it is the word of " + giver + " and of the server."
		t.advice = "Believe it as far as you believe " + giver + ". Ask " + name + " to send it again if it matters."
	case cryptohook.SourceImport:
		t.known = "The key to this message came from a file, or was there before this bot could tell from whom it came. The server says that " + name + " sent this."
	default:
		t.known = "The key to this message came from a device that is not the one it claims to be, or in a way that is not known. The server says that " + name + " sent this."
	}
	return t
}

func mismatched(v cryptohook.Verdict, name string) text {
	if v.Reason == cryptohook.ReasonReplayed {
		return text{signWarning, "This message was sent before.",
			"The same encrypted message came earlier in another event. Somebody has repeated it under the name of " + name + "; it was not decrypted again.",
			"Ignore it."}
	}
	return text{signWarning, "This was not written by " + name + ".",
		"It was encrypted by " + clip(v.UserID.String()) + " and then sent on under the name of " + name + ". It was not decrypted.",
		"Ignore it, and ask " + name + " why they sent it."}
}

// undecryptableReasons words why a message cannot be read, and what to do. %s is its sender.
var undecryptableReasons = map[string][2]string{
	cryptohook.ReasonUnknownSession: {
		"Its key has not come. %s's app may have had no connection, or does not know this bot's device yet.",
		"Ask %s to send it again; if that does not help, invite this bot anew."},
	cryptohook.ReasonUnknownIndex: {
		"The key that this bot has opens later messages only. The message was written before this bot could read along.",
		"Ask %s to send it again if it matters."},
	cryptohook.ReasonKeyDeleted: {
		"This bot had its key once and has deleted it.",
		"Ask %s to send it again if it matters."},
	cryptohook.ReasonWrongRoom: {
		"It says that it was written for another room. Somebody has put it here under the name of %s.",
		"Ignore it."},
	cryptohook.ReasonUnsupportedAlgorithm: {
		"%s's app used a kind of encryption that this bot does not know.",
		"Ask %s to use an up-to-date Matrix app."},
	cryptohook.ReasonMalformed: {
		"It is damaged, or was never a proper message of %s.",
		"Ask %s to send it again if it matters."},
	string(event.RoomKeyWithheldBlacklisted): {
		"%s's app has blocked this bot and keeps the key from it.",
		"If that was not intended, %s can unblock the bot's device in their app."},
	string(event.RoomKeyWithheldUnverified): {
		"%s's app gives keys only to devices that %[1]s has verified, and this bot's is not one of them.",
		"%s can verify this bot, or switch off \"never send encrypted messages to unverified devices\" in their app."},
	string(event.RoomKeyWithheldUnauthorized): {
		"%s's app says that this bot may not read the message, for example since it was not in the room then.",
		"Ask %s to send it again if it matters."},
	string(event.RoomKeyWithheldUnavailable): {
		"%s's app says that it does not have the key itself.",
		"Ask %s to send it again if it matters."},
	string(event.RoomKeyWithheldNoOlmSession): {
		"%s's app could not set up a secure connection to this bot.",
		"Ask %s to send it again."},
}

func undecryptable(v cryptohook.Verdict, name string) text {
	words, known := undecryptableReasons[v.Reason]
	if !known {
		words = [2]string{"%s's app gave a reason that this bot does not know for keeping the key back: " + strings.ReplaceAll(clip(v.Reason), "%", "%%"), "Ask %s to send it again."}
	}
	return text{signWarning, "I cannot read this message.", fill(words[0], name), fill(words[1], name)}
}

func fill(words, name string) string {
	if !strings.Contains(words, "%s") {
		return words
	}
	return fmt.Sprintf(words, name)
}

func describeDevice(deviceID id.DeviceID) string {
	if deviceID == "" {
		return "a device"
	}
	return "the device " + clip(deviceID.String())
}

func describeClaimants(claimants []cryptohook.Claimant) string {
	names := make([]string, 0, len(claimants))
	for _, claimant := range claimants[:min(len(claimants), 5)] {
		user := clip(claimant.UserID.String())
		if user == "" {
			user = "somebody unknown"
		}
		names = append(names, user+" ("+describeDevice(claimant.DeviceID)+")")
	}
	return strings.Join(names, ", ")
}

const longestName = 120

// clip shortens what strangers may have made long, in characters.
func clip(name string) string {
	letters := []rune(name)
	if len(letters) <= longestName {
		return name
	}
	return string(letters[:longestName]) + "…"
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

// stoppedAnswering tells a room that a sender's messages are not answered for now; without a sender, that most are not.
func stoppedAnswering(sender id.UserID) text {
	if sender == "" {
		return text{signCaution, "I have stopped answering most messages in this room for now.",
			"There are more in a minute than I answer. Until there are less than half as many, I answer only what I warn about, and that not more than once a minute for each person.",
			"A message without an answer is a message that nobody has checked."}
	}
	return text{signCaution, "I have stopped answering " + clip(sender.String()) + " for now.",
		"They send more messages in a minute than I answer. I answer them again when they send less than half as many. I go on answering everybody else.",
		"Until then nobody checks their messages: do not take it for a good sign that I say nothing."}
}

// answeringAgain tells a room that what it was told by stoppedAnswering is over.
func answeringAgain(sender id.UserID, unanswered int) text {
	whose := "messages in this room"
	headline := "I answer all messages in this room again."
	if sender != "" {
		whose = "messages of theirs in this room"
		headline = "I answer " + clip(sender.String()) + " again."
	}
	if unanswered == 1 {
		whose = strings.Replace(whose, "messages", "message", 1)
	}
	return text{signPlain, headline,
		fmt.Sprintf("I have not answered %d %s in the meantime.", unanswered, whose),
		"Nobody has checked those."}
}
