"""The words by which a prompt is read: what people call a task, and the small words that give a language away.

Written by hand. A word counts by its first six letters, which is a poor man's stemming that works in every language
here; Chinese, Japanese and Korean count by pairs of characters, for they do not put spaces where a word ends.
"""

# ruff: noqa: RUF001 - letters that look alike are other letters, which is the point

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

STEM: Final = 6

CUES: Final[Mapping[str, str]] = MappingProxyType(
    {
        "translate": """render phrase sentence vertaling traduzione traducción tłumaczenie translate translation
            translator translating localize übersetze übersetzen übersetzung traduis traduisez traduire
            traduction traduce traducir traduza traduzir traduci vertaal vertalen przetłumacz переведи перевести
            перевод переклади ترجم अनुवाद çevir översätt přelož dịch oversæt tradu 翻译 翻訳 번역""",
        "tongue": """ukrainian czech greek hebrew thai vietnamese norwegian finnish romanian hungarian polnisch
            russisch chinesisch japanisch portugais russe chinois portugués ruso chino japonés francese spagnolo
            frans duits spaans język angielskiego niemiecki english german french spanish italian portuguese
            dutch japanese chinese korean russian hindi latin arabic polish swedish danish turkish englisch
            englische deutsch deutsche französisch spanisch anglais allemand italien espagnol français inglés
            alemán francés español inglês espanhol inglese tedesco engels angielski английский немецкий
            англійською angličtiny إنجليزية अंग्रेज़ी ingilizceye engelska engelsk engleză anh 英文 英语 英語
            日语 日本語 中文 영어 일본어""",
        "summarize": """gist brief briefly nutshell overview outline bullet highlights shorter kernaussagen
            stichpunkte überblick essentiel bref esencial puntos brevemente sintesi breve kernpunten skrót
            вкратце суть итоги 大意 要旨 핵심 summarize summarise summary summarization tldr recap condense
            shorten abstract takeaways digest headline essentials synopsis minutes zusammenfassung zusammen
            fasse kürze résume résumer résumé synthèse resume resumen resumir resuma resumo riassumi riassunto
            samenvatting vat streść streszczenie кратко краткое содержание резюме sammanfatta özetle opsummer
            shrň rezumă 总结 概括 摘要 要点 要約 まとめ 요약""",
        "extract": """appear named occurring mentions locate collect retrieve welche nenne finde suche trouve
            trouver relever encuentra busca encontre trova cerca zoek znajdź найди 找出 列出 抜き 찾아 extract
            extraction parse pull grab identify list fields mentioned entities keywords extrahiere extrahieren
            liste auflisten extrais extraire relève extrae extraer saca extraia extrair estrai estrarre haal
            wypisz wyodrębnij извлеки выпиши listele çıkar vytáhni 提取 抽出 추출""",
        "format": """json csv xml yaml table fields column template schema format tabelle tableau tabla tabela""",
        "classify": """sarcastic angry serious clickbait bucket buckets group grouping sort assign decide rating
            polarity follows contradicts sortiere wütend neutral triez range agrupa etiqueta ordena etichetta
            raggruppa sorteer classify classification sentiment label labels category categorize categories
            categorise tag spam positive negative intent toxicity moderation mammals duplicates opinion
            department klassifiziere stimmung positiv negativ kategorie ordne avis positif négatif catégorie
            classe thème clasifica sentimiento clasificar categoría positivo negativo classifique sentimento
            classifica recensione positiva negativa recensie positief negatief opinia pozytywna negatywna
            klasyfikuj тональность отзыв положительная отрицательная классифицируй olumlu olumsuz duygu 分类
            情感 正面 负面 分類 肯定 否定 분류 감정 긍정""",
        "code": """makefile cli app website snippet library package module server express spring rails laravel
            cron rest crud parser algorithm git github pipeline linux unix array arrays string variable loop
            json yaml xml binary frontend webpage landing schnittstelle datei webseite anwendung fichier site
            application página aplicación archivo aplicação pagina applicazione приложение сайт 脚本 程序 网站
            プログラム アプリ 스크립트 프로그램 python javascript typescript java kotlin swift rust golang php
            ruby sql bash shell powershell regex html css react node django flask docker dockerfile kubernetes
            terraform vba awk pandas compiler api endpoint function functions method script program programm
            programa programma code codes unit component macro class query database backend postgres sqlite
            funktion skript fonction función clase função funzione funkcję функцию функция скрипт программу код
            бот functie fonksiyon kod funktionen klasse requête consulta 函数 代码 接口 関数 コード 함수 코드
            파이썬""",
        "bug": """broken hole holes terminates prints stuck deadlock overflow warning npm modulenotfounderror
            indexerror keyerror valueerror nullpointerexception segfault segmentation affiche klappt kaputt
            absturz falla funciona падает 报错 崩溃 エラー 에러 bug bugs fix error errors debug review refactor
            wrong fails failing crash crashes exception traceback flaky leak vulnerability race audit undefined
            optimize simplify readable syntax fehler überprüfe verbessere erreur corrige corriger plante errores
            revisa corrija revise erro controlla ошибку ошибка исправь błąd napraw fouten 错误 修复 问题 审查
            バグ 修正 오류 고쳐""",
        "write": """build bau baue put pen need want come help think schreiben mach erfinde denk brauche
            necesito quiero inventa haz preciso faça crea bedenk wymyśl нужен 设计 生成 想一 考え write create
            generate implement make compose draft invent port convert add schreibe schreib erstelle generiere
            verfasse écris écrire crée génère rédige escribe genera escreva crie scrivi schrijf maak napisz
            stwórz напиши создай сочини придумай yaz skriv oluştur napiš 编写 写一 用py 作成 書い 作っ 작성 써줘""",
        "story": """fantasy villain hero backstory plot legend myth fairy ballad sonnet romantic card pun riddle
            campaign farewell love fable lullaby legende gutenachtgeschichte légende romance villano leyenda
            leggenda fiaba romanzo легенда басня 童话 歌词 小说 歌詞 동화 poem poems story haiku limerick novel
            song lyrics joke tale bedtime slogan tagline scene dialogue monologue toast speech caption verse rap
            blog character narrator chapter play funny letter names gedicht geschichte kurzgeschichte witz
            märchen erzähl erzähle theaterstück poème histoire conte raconte cuento poema relato chiste história
            conto filastrocca racconto poesia рассказ стих стихотворение сказку verhaal wiersz opowiadanie saga
            hikaye şiir 诗 散文 故事 首关 俳句 物語 小説 이야기 시를""",
        "math": """much many plus minus times divided multiply multiplied fraction average ratio angle triangle
            circle speed ladder monotone converges bounded sequence odd even wahrscheinlichkeit wie viel viele
            summe durchschnitt probabilité aire vitesse probabilidad área suma quantos probabilità вероятность
            умножить сумма 概率 面积 多少 確率 面積 확률 solve equation integral derivative prove proof
            probability compute calculate eigenvalues matrix limit prime primes simplify factor differentiate
            evaluate series radius percent root square divisible sum minimize theorem polynomial induction
            volume area gleichung beweise berechne wurzel löse résous équation calcule démontre combien moyenne
            resuelve ecuación calcula cuánto demuestra derivada quanto risolvi sistema реши уравнение вычисли
            докажи сколько oblicz pole bereken hesapla derece üçgenin 计算 求解 证明 方程 等于 极值 計算 解い
            方程式 계산 합을""",
        "analysis": """weigh convincing differ sense worth feasible feasibility scenario option options
            recommendation recommend score revenue churn sollte lohnt chancen einschätzung devrait enjeux évalue
            viabilidad conviene riesgo riesgos tendría vale pena rischi стоит риски 评估 风险 可行 リスク 타당
            analyze analyse analysis compare comparison evaluate assess assessment pros cons advantages
            disadvantages tradeoffs trade risks risk swot interpret implications strengths weaknesses arguments
            discuss strategy impact causes trends examine should better versus vs analysiere vergleiche bewerte
            vorteile nachteile vor analiza compara evalúa ventajas desventajas avantages inconvénients comparer
            riscos benefícios analizza confronta проанализируй сравни плюсы минусы оцени porównaj zalety wady
            vergelijk nadelen karşılaştır 比较 分析 优缺 优点 趋势 比較 評価 利点 欠点 비교 장단 분석""",
        "ask": """does did is are tell wondered know whose whom hoeveel saber sabe quanti kan hur många どの
            いつ 多高 얼마 what who when where which why how was wer wann wo wie warum welche welcher wieso qui
            quand où comment pourquoi quelle quel quoi qué quién cuándo dónde cómo cuál quem quando onde como
            qual chi dove perché quale wat wanneer waar waarom hoe kto kiedy gdzie jak dlaczego кто когда где
            как почему какой какая хто vad mikä kuinka jaké care ما apa gì nasıl nedir neresi כיצד מהי ποια 什么
            谁写 哪座 哪里 为什 何で 何です なぜ どこ 어떻 무엇 누가""",
        "explain": """explain describe explanation difference mean means erkläre beschreibe explique décris
            explica spiega объясни опиши wyjaśnij leg açıkla 解释 说明 説明 설명""",
        "greet": """worries welcome cheers evening afternoon congrats coucou bonsoir buenas buenos días tardes
            boa noite bom dia buongiorno sera guten tag abend na добрый день goedemorgen dobry dzień günaydın
            hello hi hey thanks thank bye goodbye morning night sorry ok okay lol haha yes no nice wow great hmm
            hallo danke tschüss bonjour merci salut bientôt ça hola gracias luego oi obrigado obrigada olá tudo
            ciao grazie hoi bedankt cześć dzięki słychać привет спасибо здравствуйте дела merhaba teşekkürler
            nasılsın مرحبا سلام नमस्ते hej tack hei halo kabar chào khỏe 你好 谢谢 再见 こんに ありが 元気 안녕
            감사 반가""",
        "feel": """miserable angry afraid worried proud excited love hate heart comparing mood traurig müde
            triste fatigué cansado i me my myself feel feeling felt sad stressed bored nervous lonely happy
            anxious tired crying talk chat friend ich mich mir fühle einsam je moi yo siento eu mi sento я мне
            мной jag""",
        "you": """you your yourself du dir dich vous toi tú te ti usted você tu jij je ty ci ты тебя вы sen kamu
            bạn あなた 你是 당신""",
    }
)
"""What people call each kind of task, in the languages the labelled prompts are in."""

SMALL_TALK: Final = frozenset({"ask", "explain", "greet", "feel", "you"})
"""Cues that say nothing in a system prompt: "You are a helpful assistant" is not a conversation."""

EFFORT: Final[Mapping[str, str]] = MappingProxyType(
    {
        "steps": """then afterwards finally first second next step steps each every separately before after both
            also dann danach anschließend schließlich schritt jede jeden ensuite puis enfin étape chaque luego
            después finalmente paso cada depois затем потом каждый шаг każdy 然后 最后 步骤 逐步 每个 次に 最後
            그리고""",
        "limits": """must without only exactly keep never always least most avoid require requirements support
            supports handle ensure consistent unless under maximum minimum valid following muss ohne nur genau
            mindestens höchstens darf beachte achte doit sans seulement exactement garder gardant debe sin solo
            mantén mantendo deve senza не только должен 要求 必须 保持 不能 需要 必ず""",
        "depth": """prove proof derive design architecture distributed concurrency concurrent security recovery
            rigorous thoroughly depth complete trade justify consistency asymptotic optimal scalable audit
            synthesis evaluate critically complexity invariants failure protocol generalize verallgemeinere
            beweise bewerte begründung démontre étudie approches limites détermine evalúa justifica matriz
            докажи обобщи обоснуй 设计 架构 证明 分布 解释""",
        "parts": """explain include tests test list compare document describe provide show write analyze analyse
            rank propose recommend recommendation add handle discuss assess identify label erkläre liste
            vergleiche nutze explique compara construye incluye объясни перечисли 给出 分析 说明 列出""",
    }
)
"""Words of prompts that ask for much: several steps, conditions, depth, several parts."""

SMALL_WORDS: Final[Mapping[str, str]] = MappingProxyType(
    {
        "en": """the of and to is in it that for you with this are my what how from write be on was which please
            an by me can not have i why who do does all hi hello a were at or into want your tell translate
            summarize explain give solve compute factor simplify good morning ok lol wow sorry yes no find list
            classify there more many story short hmm test""",
        "de": """der die das und ist ein eine einen nicht ich zu den von mit auf für wie was im dem des sich
            auch oder bitte wir sie es aus dir mir hat wer schreibe folgenden hallo danke wo bei falsch ins
            übersetze fasse kann meine""",
        "fr": """le la les des est et une un dans pour que qui sur ce cet cette avec pas je du au plus sont mon
            quelle comment merci bonjour vous nous par écris ces combien font en traduis résume dit-on dit fais""",
        "es": """el la los las de y es una un que en por para con del se no qué cómo cuál está mi muchas gracias
            este esta al lo su son hola escribe sobre saca traduce resume calcula""",
        "pt": """o a os as de e é uma um que em por para com do da no na não qual como está meu minha seu ao dos
            das você obrigado escreva isto este esta bem oi sobre quanto traduza resuma""",
        "it": """il lo la gli le di e è una un che in per con del della non come sono questo questa mi si scrivi
            grazie ciao stai dei dal nel alla chi perché tutti traduci riassumi estrai dice""",
        "nl": """de het een en is van in dat niet op te met voor zijn hoe wat deze dit die ik je er naar schrijf
            uit hoi gaat wie waar bij ook bereken vertaal vat haal""",
        "pl": """i w na z do nie się jest to że jak co ten ta po od dla czy przez za kto napisz oraz które był
            cześć funkcję wszystkie o oblicz""",
        "sv": """och det att en ett är som på av för med den inte jag till har om hur vad kan från skriv hej du
            idag mina nedan kort översätt sammanfatta""",
        "da": """og det at en er som på af for med den ikke jeg til har hvordan hvad kan fra skriv du skal vil
            kommer sætninger i oversæt""",
        "fi": """ja on ei se että mitä mikä kuinka minä sinä kirjoita hei ovat tämä tänään monta siellä sinulle
            kuuluu asukasta""",
        "cs": """a je se na v že to do jak jaké co s z pro kde jsem není kdo ahoj prosím napiš nejbližší hlavní
            město""",
        "tr": """ve bir bu için ile mi mı mu ne nasıl var olan en da de kadar çok nasılsın merhaba şu tüm yaz
            nedir listele özetle aşağıdaki derecedir""",
        "vi": """là của và có không tôi bạn gì này cho một được người trong với những các sang tiếng rất chào
            khỏe dịch""",
        "id": """dan yang di ini itu apa dengan untuk dari tidak ada saya kamu bisa berapa adalah ke pada kabar
            halo senang jumlah""",
        "ro": """și este în un o de la care unde cu pe nu mai sunt câți din pentru că ce salut are""",
    }
)
"""The commonest words of the larger languages in Latin script."""
